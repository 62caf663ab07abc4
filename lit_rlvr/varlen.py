"""Attention over a pack in one call: the flash attention that torch has for sequences of different lengths.

It needs no mask and no padding, whatever the lengths. :func:`varlen_serves` says where it is used: in bfloat16 and
float16 on NVIDIA's devices from compute capability 8.0 on.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Self

import torch
from torch import Tensor

from lit_rlvr.devices import send

DTYPES = (torch.bfloat16, torch.float16)
"""What the kernel computes in."""

HARMLESS = ("scaling", "position_ids", "use_cache")
"""Options of transformers' attention interface that are passed on, or change nothing here."""

CALL = ("scale", "window_size", "enable_gqa")
"""Options of torch's function that :func:`attend_spans` gives."""


@dataclass(frozen=True)
class Spans:
    """Which queries and keys of a pack belong together, sequence by sequence; none is empty.

    Args:
        queries: Where the queries of each sequence begin in the pack, and how many there are [n + 1], int32.
        keys: The same of the keys, where those of a sequence that continues a prompt stand behind the prompt's [n + 1],
            int32.
        longest: Most queries and most keys of a sequence.
        places: Place in the pack of each key; None: keys stand as queries do.
    """

    queries: Tensor
    keys: Tensor
    longest: tuple[int, int]
    places: Tensor | None = None

    @classmethod
    def of(cls, sequences: Sequence[tuple[range, range]]) -> Self:
        """Make them of the places of each sequence's prompt, which may be none, and of its own tokens."""
        own, seen = [len(s) for _, s in sequences], [len(p) + len(s) for p, s in sequences]
        ends = [torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (own, seen)]
        places = None
        if own != seen:
            places = torch.cat([torch.arange(r.start, r.stop) for sequence in sequences for r in sequence])
        return cls(ends[0], ends[1], (max(own), max(seen)), places)

    def to(self, device: torch.device) -> Self:
        """The same with its tensors on ``device``."""
        places = None if self.places is None else send(self.places, device)
        return replace(self, queries=send(self.queries, device), keys=send(self.keys, device), places=places)


def varlen_serves(query: Tensor, value: Tensor, options: Mapping[str, Any]) -> bool:
    """Whether one call of the kernel gives what transformers' SDPA would give.

    Args:
        query: Any shape [..., d].
        value: Any shape [..., d].
        options: What the model tells its attention beside tensors and window. Those that are unknown here must be off.
    """
    size = query.shape[-1]
    return (
        available(query.device)
        and torch.backends.cuda.flash_sdp_enabled()
        and dtype_of(query) in DTYPES
        and value.shape[-1] == size
        and size % 8 == 0
        and (size <= 192 or 224 < size <= 256)  # some devices have no backward pass between
        and not any(isinstance(x, Tensor) or x for name, x in options.items() if name not in HARMLESS)
    )


@cache
def available(device: torch.device) -> bool:
    """Whether a device, and torch as it is installed, have the kernel."""
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and kernel() is not None
    )


@cache
def kernel() -> Callable[..., Any] | None:
    """Torch's function; None where this version does not have it, or without windows and grouped queries."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if set(CALL) <= inspect.signature(varlen_attn).parameters.keys() else None


def dtype_of(query: Tensor) -> torch.dtype:
    """What SDPA computes in: under autocast that of autocast, to which torch itself does not bring a custom kernel."""
    device = query.device.type
    if torch.is_autocast_enabled(device) and query.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return query.dtype


def attend_spans(
    query: Tensor, key: Tensor, value: Tensor, spans: Spans, window: int | None, scale: float | None
) -> Tensor:
    """Attend causally within each sequence.

    Args:
        query: [total, heads, d].
        key: [total, key heads, d].
        value: [total, key heads, d].
        spans: The sequences.
        window: Keys that a query sees, itself included; None: all.
        scale: Factor of the scores; None: 1 / sqrt(d).

    Returns:
        [total, heads, d].
    """
    dtype, call = dtype_of(query), kernel()
    assert call is not None
    query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
    if spans.places is not None:
        gather: Any = _Gather.apply
        key, value = gather(key, spans.places), gather(value, spans.places)
    # Flash attention counts both sides of the window from the key that is as far from the last one as the query is from
    # the last query: the last query sees the last key.
    sides = (-1 if window is None else window - 1, 0)
    grouped = query.shape[1] != key.shape[1]
    options = {"scale": scale, "window_size": sides, "enable_gqa": grouped}
    attended: Tensor = call(query, key, value, spans.queries, spans.keys, *spans.longest, **options)
    return attended


class _Gather(torch.autograd.Function):
    """``values[places]``, where the gradients of a place that is read many times are added in float32 at the least.

    A prompt has one from each of its responses; in bfloat16 every addition would round the sum to 8 bits.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.total = len(values)
        return values.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, *outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (places,), gradient = ctx.saved_tensors, outputs[0]
        wide = torch.promote_types(gradient.dtype, torch.float32)
        total = gradient.new_zeros(ctx.total, *gradient.shape[1:], dtype=wide)
        return total.index_add_(0, places, gradient.to(wide)).to(gradient.dtype), None
