"""Decoding steps as captured graphs: one launch in place of hundreds, which take longer than what they compute.

A graph is the same kernels on the same memory. So tokens, positions and the column that is written lie in tensors that
stay where they are, and attention reads the whole storage behind a mask. One graph serves a number of rows and a width
of the storage. Rows of it that are not in use compute something finite, in slots that are not in use.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from lit_rlvr.engines.capture import Recorder, Replay
from lit_rlvr.engines.slots import SlotCache, SlotLayer
from lit_rlvr.policy import Policy
from lit_rlvr.segments import NAME

log = logging.getLogger(__name__)

SPARE = 256
"""Columns that storage grows by at the least: every growth means new graphs."""
PATIENCE = 8
"""Steps that a larger graph is used for fewer rows, before one of their own is captured."""


class StepGraphs:
    """Captured decoding steps of one rollout.

    Args:
        policy: The policy, whose weights stay where they are.
        cache: Its keys and values; no layer has a window.
        like: Logits of any step [n, V], for their dtype.
        recorder: Makes a recorder; each width of the storage has one of its own.
    """

    def __init__(self, policy: Policy, cache: SlotCache, like: Tensor, recorder: Callable[[], Recorder]) -> None:
        slots, device = cache.slots[0].slots, like.device
        self.policy, self.cache, self.make = policy, cache, recorder
        self.token, self.position = (torch.zeros(slots, 1, dtype=torch.int64, device=device) for _ in range(2))
        self.column = torch.zeros(1, dtype=torch.int64, device=device)
        self.logits = like.new_zeros(slots, like.shape[-1])
        self.width, self.recorder = 0, recorder()
        self.replays: dict[int, Replay] = {}
        """By their number of rows."""
        self.wanted: Counter[int] = Counter()
        """Steps for which each number of rows would have been the right one."""
        self.captures = 0

    def next_logits(self, token: Tensor, position: Tensor) -> Tensor:
        """Extend the cache by ``token`` [n] at ``position`` [n]. Returns logits [n, V], valid until the next step."""
        return self._run(token, position, self.cache.extend())

    def agrees(self, token: Tensor, position: Tensor, logits: Tensor) -> bool:
        """Whether a step that was just taken without graphs has the same ``logits`` [n, V] with them.

        The same sums in another order; in bfloat16 each of many layers rounds by 2^-8. Attention to a wrong column
        changes a good part of the logits. If they differ, the cache is left as the other step has made it.
        """
        column = self.cache.slots[0].high - 1
        parts = [storage[:, :, column] for layer in self.cache.slots for storage in layer.storage]
        before = [part.clone() for part in parts]
        again = self._run(token, position, column)
        wanted, got = (x.double() - x.double().mean(-1, keepdim=True) for x in (logits, again))
        tolerance = 1e-1 if torch.bfloat16 in {part.dtype for part in parts} else 1e-3
        right = bool(((got - wanted).norm(dim=-1) <= tolerance * wanted.norm(dim=-1)).all())
        if not right:
            for part, old in zip(parts, before, strict=True):
                part.copy_(old)
        return right

    def _run(self, token: Tensor, position: Tensor, column: int) -> Tensor:
        rows = len(token)
        self.token[:rows, 0], self.position[:rows, 0] = token, position
        self.column.fill_(column)
        self._graph(rows)()
        return self.logits[:rows]

    def _graph(self, rows: int) -> Replay:
        """The smallest graph for so many rows; a captured one that is larger, while they are wanted for the moment."""
        if self.width != self.cache.width:
            self.replays.clear()
            self.wanted.clear()
            self.width, self.recorder = self.cache.width, self.make()
        size = bucket(rows, len(self.token))
        self.wanted[size] += 1
        larger = [captured for captured in self.replays if captured >= size]
        if size not in self.replays and (not larger or self.wanted[size] > PATIENCE):
            with _uncached_autocast(self.logits.device):
                self.replays[size] = self.recorder.record(partial(self._step, size))
            self.captures += 1
            return self.replays[size]
        return self.replays[min(larger)]

    def _step(self, rows: int) -> None:
        """What is captured.

        A row's tokens are the ``position`` columns before the one that is written. Whatever was left behind in a row
        that is not in use, it sees that one, so that nothing is NaN.
        """
        position = self.position[:rows]
        places = torch.arange(self.width, device=position.device)
        seen = (places >= self.column - position) & (places <= self.column)
        mask = torch.zeros(seen.shape, dtype=self.policy.hf.dtype, device=seen.device)
        mask = mask.masked_fill(~seen, -torch.inf)[:, None, None]
        cache = Cache(layers=[_WholeLayer(layer, rows, self.column) for layer in self.cache.slots])
        self.logits[:rows].copy_(self.policy.next_logits(self.token[:rows], mask, position, cache))


class _WholeLayer(CacheLayerMixin):
    """A layer as a graph sees it: all columns of the first ``rows`` slots, and a tensor [1] with the one to write."""

    is_sliding = False

    def __init__(self, layer: SlotLayer, rows: int, column: Tensor) -> None:
        super().__init__()
        self.keys, self.values = (storage[:rows] for storage in layer.storage)
        self.column, self.is_initialized = column, True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the storage is there."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the column [rows, heads, 1, head size] and return everything."""
        assert self.keys is not None
        assert self.values is not None
        self.keys.index_copy_(2, self.column, key_states.to(self.keys.dtype))
        self.values.index_copy_(2, self.column, value_states.to(self.values.dtype))
        return self.keys, self.values

    def get_seq_length(self) -> int:
        assert self.keys is not None
        return self.keys.shape[2] - 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1


def bucket(rows: int, slots: int) -> int:
    """The rows of a graph: a power of two or three quarters of one, at most ``slots``.

    >>> [bucket(rows, 11) for rows in range(1, 12)]
    [1, 2, 3, 4, 6, 6, 8, 8, 11, 11, 11]
    """
    power: int = 1 << (rows - 1).bit_length()
    return min(slots, power * 3 // 4 if rows <= power * 3 // 4 else power)


def why_not(policy: Any, windows: list[int | None] | None) -> str | None:
    """Why the policy's decoding steps cannot be captured, as half a sentence; None: they can."""
    hf, sharded = policy.hf, (FSDPModule, FullyShardedDataParallel)
    config = hf.config.get_text_config()
    attention, rope = config._attn_implementation, _rope_types(getattr(config, "rope_parameters", None))
    reasons = {
        f"the policy is on {policy.device}, which has no CUDA graphs": policy.device.type != "cuda",
        "its weights are spread over devices": any(isinstance(module, sharded) for module in policy.modules()),
        "its layers keep more than keys and values": windows is None,
        "its layers attend within a sliding window": windows is not None and any(windows),
        f"its attention is {attention}, not sdpa or eager": attention not in ("sdpa", "eager", NAME),
        "its rotary embedding depends on the longest row": bool({"dynamic", "longrope"} & rope),
        f"what {type(hf).__name__} computes depends on values": not hf._can_compile_fullgraph,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _rope_types(parameters: Any) -> set[str]:
    """Kinds of rotary embedding, which some models have by the kind of their layers."""
    if not isinstance(parameters, dict):
        return set()
    return {str(parameters.get("rope_type"))}.union(*map(_rope_types, parameters.values()))


@contextmanager
def _uncached_autocast(device: torch.device) -> Iterator[None]:
    """Autocast as it is, without its cache: a weight that is cast while capturing lies in the graph's own memory."""
    kind = device.type
    on = torch.is_autocast_enabled(kind)
    with torch.autocast(kind, torch.get_autocast_dtype(kind), enabled=on, cache_enabled=False):
        yield
