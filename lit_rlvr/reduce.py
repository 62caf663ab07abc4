"""The only road to a collective: sums and maxima over ranks, and the exchange of small objects."""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class Reduce(Protocol):
    """Reductions over all ranks. Every rank must make the same calls in the same order."""

    rank: int
    world_size: int

    def sum(self, value: Tensor) -> Tensor:
        """Element-wise sum over ranks."""
        ...

    def max(self, value: Tensor) -> Tensor:
        """Element-wise maximum over ranks."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """Every rank's ``value``, in rank order."""
        ...


class LocalReduce:
    """One process: every reduction is the identity."""

    rank = 0
    world_size = 1

    def sum(self, value: Tensor) -> Tensor:
        return value

    def max(self, value: Tensor) -> Tensor:
        return value

    def gather(self, value: Any) -> list[Any]:
        return [value]


class DistributedReduce:
    """Reductions over the default process group."""

    def __init__(self, device: torch.device) -> None:
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self.device = device

    def _all_reduce(self, value: Tensor, op: Any) -> Tensor:
        moved = value.detach().clone().to(self.device)
        dist.all_reduce(moved, op=op)
        return moved.to(value.device)

    def sum(self, value: Tensor) -> Tensor:
        return self._all_reduce(value, dist.ReduceOp.SUM)

    def max(self, value: Tensor) -> Tensor:
        return self._all_reduce(value, dist.ReduceOp.MAX)

    def gather(self, value: Any) -> list[Any]:
        parts: list[Any] = [None] * self.world_size
        dist.all_gather_object(parts, value)
        return parts


def default_reduce(device: torch.device) -> Reduce:
    """The process group's reductions where one is running, else the local identity."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return DistributedReduce(device)
    return LocalReduce()


def mean(reduce: Reduce, values: Tensor, mask: Tensor | None = None) -> float:
    """Mean of ``values`` over all ranks, where ``mask`` is true; 0.0 when nothing is.

    >>> mean(LocalReduce(), torch.tensor([1.0, 3.0]))
    2.0
    """
    picked = values.double() if mask is None else values[mask].double()
    total, count = reduce.sum(torch.stack([picked.sum(), torch.tensor(float(picked.numel())).to(picked)])).tolist()
    return total / count if count else 0.0


def extremes(reduce: Reduce, values: Tensor, mask: Tensor | None = None) -> tuple[float, float]:
    """Smallest and largest of ``values`` over all ranks, where ``mask`` is true; (0.0, 0.0) when nothing is.

    >>> extremes(LocalReduce(), torch.tensor([3.0, 1.0, 9.0]), torch.tensor([True, True, False]))
    (1.0, 3.0)
    """
    picked = values.flatten() if mask is None else values[mask]
    ends = torch.full((2,), -torch.inf, dtype=torch.float64, device=values.device)
    if len(picked):
        ends = torch.stack([-picked.amin(), picked.amax()]).double()
    minus_smallest, largest = reduce.max(ends).tolist()
    return (0.0 - minus_smallest, largest) if largest > -torch.inf else (0.0, 0.0)
