"""Choosing tokens by rank or by quantile over all ranks, without gathering them: a radix select over histograms."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lit_rlvr.reduce import Reduce

DIGIT_BITS = 16


def sortable(values: Tensor) -> Tensor:
    """Map float32 to int64 in [0, 2^32) so that the order is kept; -0.0 equals 0.0.

    >>> sortable(torch.tensor([-1.0, 0.0, 2.0])).diff().sign().tolist()
    [1, 1]
    """
    bits = (values.float() + 0.0).contiguous().view(torch.int32).long() & 0xFFFFFFFF
    return torch.where(bits >= 1 << 31, 0xFFFFFFFF - bits, bits + (1 << 31))


def from_sortable(key: int) -> float:
    """The float32 that :func:`sortable` maps to ``key``.

    >>> [from_sortable(int(key)) for key in sortable(torch.tensor([-1.5, 0.0, 2.0]))]
    [-1.5, 0.0, 2.0]
    """
    bits = key - (1 << 31) if key >= 1 << 31 else 0xFFFFFFFF - key
    signed = bits - (1 << 32) if bits >= 1 << 31 else bits
    return float(torch.tensor(signed, dtype=torch.int32).view(torch.float32))


def _edge(digits: Tensor, k: int, reduce: Reduce) -> tuple[int, int, int]:
    """Where the k-th largest digit stands: its value, how many are larger, and how many there are over all ranks."""
    histogram = reduce.sum(torch.bincount(digits, minlength=1 << DIGIT_BITS))
    # From the largest digit down: how many stand at or above it.
    at_or_above = histogram.flip(0).cumsum(0).flip(0)
    total = int(at_or_above[0])
    if not 0 < k <= total:
        return 0, 0, total
    edge = int((at_or_above >= k).nonzero().max())
    return edge, int(at_or_above[edge] - histogram[edge]), total


def top_k(keys: list[Tensor], eligible: Tensor, k: int, reduce: Reduce) -> Tensor:
    """Mark the ``k`` eligible elements, over all ranks, that come first by ``keys``.

    Each key is compared where all before it tie; the larger number wins. Histograms of 16-bit digits are summed
    over ranks, so the cost is a few small reductions whatever the number of tokens.

    Args:
        keys: Non-negative int64 tensors of one shape, most significant first; together they must be unique.
        eligible: Elements to choose from, bool, of the same shape.
        k: How many to choose over all ranks; at most the number of eligible elements.
        reduce: Sums over ranks.

    Returns:
        A bool tensor with exactly ``k`` true elements over all ranks.
    """
    chosen, open_ = torch.zeros_like(eligible), eligible.clone()
    left = k
    for key in keys:
        for shift in range(48, -1, -DIGIT_BITS):
            digit = (key >> shift) & 0xFFFF
            edge, above, total = _edge(digit[open_], left, reduce)
            if left <= 0:
                return chosen
            if left >= total:
                return chosen | open_
            chosen = chosen | (open_ & (digit > edge))
            left -= above
            open_ = open_ & (digit == edge)
    # Unique keys leave `left` open elements; with ties in every key all of them would be equal.
    return chosen | open_


def kth_largest(values: Tensor, eligible: Tensor, k: int, reduce: Reduce) -> float:
    """The ``k``-th largest eligible value over all ranks.

    Args:
        values: float32, of any shape.
        eligible: Elements to look at, bool, of the same shape.
        k: From 1 to the number of eligible elements over all ranks.
        reduce: Sums over ranks.

    Raises:
        ValueError: When there are fewer than ``k``.
    """
    key, open_, left, found = sortable(values), eligible, k, 0
    for shift in (DIGIT_BITS, 0):
        digit = (key >> shift) & 0xFFFF
        edge, above, total = _edge(digit[open_], left, reduce)
        if not 0 < left <= total:
            raise ValueError(f"there is no {left}-th largest of {total} values")
        open_, left, found = open_ & (digit == edge), left - above, found << DIGIT_BITS | edge
    return from_sortable(found)


def quantile(values: Tensor, eligible: Tensor, q: float, reduce: Reduce) -> float:
    """The ``q`` quantile of the eligible values over all ranks, interpolated linearly; NaN when there are none.

    The same float32 number as ``torch.quantile`` of all of them in one place, up to 2^24 of them. Above, the place of
    the quantile is taken in float64, because float32 cannot count so far.

    Args:
        values: float32, of any shape.
        eligible: Elements to look at, bool, of the same shape.
        q: In [0, 1].
        reduce: Sums over ranks.
    """
    n = int(reduce.sum(eligible.sum()))
    if n == 0:
        return math.nan
    place = torch.tensor(q, dtype=torch.float32 if n <= 1 << 24 else torch.float64) * (n - 1)
    low, high = int(place.floor()), int(place.ceil())
    ends = [kth_largest(values, eligible, n - index, reduce) for index in dict.fromkeys((low, high))]
    return float(torch.lerp(torch.tensor(ends[0]), torch.tensor(ends[-1]), (place - low).float()))


def share(rho: float, n: int) -> int:
    """ceil(rho * n), without the rounding error that makes 0.07 * 100 come out as 8.

    >>> share(0.07, 100), share(0.2, 16), share(1.0, 7)
    (7, 4, 7)
    """
    return min(n, max(1, math.ceil(rho * n - 1e-9 * max(1.0, rho * n))))
