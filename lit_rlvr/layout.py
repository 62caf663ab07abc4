"""How rows are laid out for a model, and which models allow more than padding."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from lit_rlvr.last_layer import read_only
from lit_rlvr.packing import pack_rows
from lit_rlvr.segments import enable, hidden_states
from lit_rlvr.varlen import varlen_serves

Layout = Literal["padded", "packed", "shared"]

KNOWN = ("gemma", "gemma3_text", "gpt2", "granite", "llama", "mistral", "phi3", "qwen2", "qwen3", "smollm3")
"""Kinds of models whose packs are tested against padded rows, and which share prompts unless told otherwise."""


def choose_layout(hf: PreTrainedModel, layout: Layout | None) -> Layout:
    """Decide how rows are laid out for a model, and make it able to.

    Args:
        hf: The model.
        layout: What is asked for; null: ``shared`` for the models in :data:`KNOWN`, ``padded`` for others.

    Raises:
        ValueError: When the model does not allow what is asked for.
    """
    kind = hf.config.get_text_config().model_type
    if layout == "padded" or (layout is None and kind not in KNOWN):
        return "padded"
    why_not = enable(hf)
    if why_not is None:
        if kind in KNOWN:
            read_only(hf)
        return layout or "shared"
    if layout is None:
        return "padded"
    raise ValueError(f"batch.layout {layout} does not go with {type(hf).__name__}: {why_not}; use batch.layout: padded")


@dataclass(frozen=True)
class Reader:
    """How a model reads rows.

    Args:
        device: Where it computes.
        layout: How rows are laid out for it.
        masks: Whether its attention takes a mask where a response shares its prompt: all that takes several calls.
    """

    device: torch.device
    layout: Layout = "padded"
    masks: bool = True

    @classmethod
    def of(cls, model: Any, device: torch.device) -> Reader:
        """Of a policy or a critic that computes on ``device``; under the autocast in which it will compute."""
        config = model.hf.config.get_text_config()
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        head = torch.empty(0, size, dtype=model.narrowed or model.hf.dtype, device=device)
        return cls(device, model.layout, not varlen_serves(head, head, {}))


@torch.no_grad()
def check_packs(hf: PreTrainedModel) -> None:
    """Compare a pack with the same rows on their own: a prompt with two responses, and a row beside them.

    Once when all places are read, and once when only the last of each row is.

    Raises:
        ValueError: When they differ: tokens of the model see each other in another way than by causal attention.
    """
    rows = [torch.tensor(tokens) for tokens in ([1, 2, 0], [1, 2, 1, 1], [0, 1, 1])]
    prompts, responses = [row[:2] for row in rows], [row[2:] for row in rows]
    ids, before, first, pack = pack_rows(prompts, responses, [0, 0, 1])
    final = first + torch.tensor([len(response) for response in responses]) - 1
    hidden, ends = (
        hidden_states(hf.base_model, ids.to(hf.device), replace(pack, read=read).to(hf.device))[0]
        for read in (None, final)
    )
    # Packed and alone are the same sums in another order; in bfloat16 each of a few layers rounds by 2^-8.
    tolerance = 1e-1 if hf.dtype == torch.bfloat16 else 1e-3
    for row, response, last, start in zip(rows, responses, before.tolist(), first.tolist(), strict=True):
        alone = hidden_states(hf.base_model, row[None].to(hf.device), None)[0]
        stop = start + len(response)
        packed = torch.cat([hidden[last - 1 : last + 1], hidden[start:stop], ends[stop - 1 : stop]])
        alone = torch.cat([alone, alone[-1:]])
        if (packed - alone).norm() > tolerance * alone.norm():
            raise ValueError(
                f"{type(hf).__name__} does not give in a pack what it gives for rows on their own; use batch.layout: "
                "padded"
            )
