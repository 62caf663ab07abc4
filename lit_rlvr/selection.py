"""Choosing exactly k of n tokens over all ranks, without gathering them: a radix select over histograms."""

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
            histogram = reduce.sum(torch.bincount(digit[open_], minlength=1 << DIGIT_BITS))
            # From the largest digit down: how many stand at or above it.
            at_or_above = histogram.flip(0).cumsum(0).flip(0)
            above = torch.cat([at_or_above[1:], at_or_above.new_zeros(1)])
            if left <= 0:
                return chosen
            if left >= int(at_or_above[0]):
                return chosen | open_
            edge = int((at_or_above >= left).nonzero().max())
            chosen = chosen | (open_ & (digit > edge))
            left -= int(above[edge])
            open_ = open_ & (digit == edge)
    # Unique keys leave `left` open elements; with ties in every key all of them would be equal.
    return chosen | open_


def share(rho: float, n: int) -> int:
    """ceil(rho * n), without the rounding error that makes 0.07 * 100 come out as 8.

    >>> share(0.07, 100), share(0.2, 16), share(1.0, 7)
    (7, 4, 7)
    """
    return min(n, max(1, math.ceil(rho * n - 1e-9 * max(1.0, rho * n))))
