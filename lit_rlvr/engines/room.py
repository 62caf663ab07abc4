"""How many rows can be decoded at a time in the memory that a device has free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from lit_rlvr.engines import prefill
from lit_rlvr.engines.slots import kept_dtype, widest
from lit_rlvr.policy import Policy

SHARE = 0.9
"""Of the memory that is free; the rest is for what passes make on their way, and for what lies in pieces."""
DRAW_COPIES = 10
"""Float32 [rows, vocabulary] tensors alive at once when a token is drawn with top-p, which sorts them."""


@dataclass(frozen=True)
class Needs:
    """Bytes that a rollout takes beside the weights.

    Args:
        row: For each row that is decoded at a time, at its longest.
        aside: However many rows there are.
    """

    row: int
    aside: int

    def rows(self, free: int) -> int:
        """How many rows fit into so many bytes; one is always tried."""
        return max(1, int((SHARE * free - self.aside) // self.row))


def free_memory(device: torch.device) -> int | None:
    """Bytes that tensors can still take on a device, those that PyTorch holds unused included; None: not known."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    unused: int = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + unused


def needs(policy: Policy, prompts: Sequence[Sequence[int]], samples: int, new: int, spare: int, slots: bool) -> Needs:
    """What decoding takes; how large the cache of a token is, one token tells.

    Args:
        policy: The policy.
        prompts: Prompt tokens.
        samples: Responses per prompt.
        new: Tokens of the longest response.
        spare: Columns that storage grows by at the least.
        slots: Whether rows are decoded over slots, whose prompts are prefilled a few at a time. Else those of all rows
            are prefilled at once.
    """
    config: Any = policy.hf.config.get_text_config()
    longest, total = max(map(len, prompts)), sum(map(len, prompts))
    layers = _of_one_token(policy)
    sizes = [_bytes(layer, longest + new, spare, slots) for layer in layers]
    copies = config.num_attention_heads / (getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    # Behind a mask, keys and values of a layer are repeated for every query head; and a storage that grows is copied.
    row = sum(sizes) + int((1 + copies) * max(sizes)) + DRAW_COPIES * 4 * config.vocab_size
    activations = _activations(config) * policy.hf.dtype.itemsize
    if not slots:
        return Needs(row + -(-longest * activations // samples), 0)
    together = min(total, max(longest, prefill.TOKENS))
    return Needs(row, together * (activations + sum(_per_token(layer, slots) for layer in layers)))


@torch.no_grad()
def _of_one_token(policy: Policy) -> list[Any]:
    """The layers of a cache in which there is one token."""
    zero, cache = torch.zeros(1, 1, dtype=torch.int64, device=policy.device), DynamicCache(config=policy.hf.config)
    policy.next_logits(zero, None, zero, cache)
    return cache.layers


def _bytes(layer: Any, most: int, spare: int, slots: bool) -> int:
    """What a row of ``most`` tokens takes in a layer: keys and values of those in its window, and its states."""
    states = [s for name in ("conv_states", "recurrent_states") for s in getattr(layer, name, {}).values()]
    window = getattr(layer, "sliding_window", None)
    columns = widest(most if window is None else min(most, window), spare)
    return columns * _per_token(layer, slots) + sum(state.nbytes for state in states if isinstance(state, Tensor))


def _per_token(layer: Any, slots: bool) -> int:
    """Bytes of a token's key and value, as slots or transformers' own cache keep them."""
    both = (getattr(layer, name, None) for name in ("keys", "values"))
    kept = [states for states in both if isinstance(states, Tensor)]
    return sum(states.numel() * (kept_dtype(states) if slots else states.dtype).itemsize for states in kept)


def _activations(config: Any) -> int:
    """Numbers alive at once for a token in a pass: between a layer's two products, and some of the hidden size."""
    experts, each = (getattr(config, name, None) or 0 for name in ("num_experts_per_tok", "moe_intermediate_size"))
    inner = max(getattr(config, "intermediate_size", None) or 4 * config.hidden_size, experts * each)
    return int(3 * inner + 8 * config.hidden_size)
