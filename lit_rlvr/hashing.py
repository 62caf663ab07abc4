"""Counter-based random numbers: a pure function of integers, the same on every device and rank.

Sampling by (seed, phase, draw, sample, position) makes a rollout independent of batch composition, row order and
the number of ranks, and leaves no generator state to save. The mixer is the finaliser of SplitMix64
(Steele, Lea and Flood 2014), in wrapping int64 arithmetic.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 (``>>`` alone copies the sign bit)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    """Reinterpret an unsigned 64-bit integer as signed."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN, _MIX1, _MIX2 = (_signed(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def hash_integers(*keys: Tensor | int) -> Tensor:
    """Mix broadcastable integers into one pseudo-random int64 tensor.

    >>> bool((hash_integers(1, torch.arange(3)) == hash_integers(1, torch.arange(3))).all())
    True
    """
    state: Tensor = torch.zeros((), dtype=torch.int64)
    for key in keys:
        number = key.to(torch.int64) if isinstance(key, Tensor) else _signed(key)
        on_any_device = state.dim() == 0 and state.device.type == "cpu"  # and is not copied there, which would wait
        if isinstance(number, Tensor) and not on_any_device:
            number = number.to(state.device)
        state = (state ^ number) + _GOLDEN
        state = (state ^ _shift_right(state, 30)) * _MIX1
        state = (state ^ _shift_right(state, 27)) * _MIX2
        state = state ^ _shift_right(state, 31)
    return state


def uniform(*keys: Tensor | int) -> Tensor:
    """Return float64 numbers in [0, 1), one per broadcast element of ``keys``."""
    return _shift_right(hash_integers(*keys), 11).to(torch.float64) * 2.0**-53
