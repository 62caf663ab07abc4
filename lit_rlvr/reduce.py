"""The only road to a collective: sums and maxima over ranks, and the exchange of small objects and of failures."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


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


def on_every_rank(do: Callable[[], T], reduce: Reduce, meanwhile: Iterable[Any] = ()) -> list[T]:
    """Do something on every rank and wait for all; a failure on any is raised on every rank, so that none waits for it.

    Args:
        do: What each rank does. It returns something small. A rank that fails must not leave others in a collective.
        reduce: Reaches the other ranks.
        meanwhile: What all go through at the same time; a rank that failed goes through what it has left of it.

    Returns:
        What it returned, in rank order.

    Raises:
        Exception: On a rank that failed, what it failed of.
        RuntimeError: On the others, which rank failed, and of what.
    """
    result, failure = None, None
    try:
        result = do()
    except Exception as error:
        failure = error
    for _ in meanwhile:
        pass
    said: list[tuple[str | None, T]] = reduce.gather((failure and _in_words(failure), result))
    if failure is not None:
        raise failure
    for rank, (words, _) in enumerate(said):
        if words is not None:
            raise RuntimeError(f"on rank {rank}: {words}")
    return [result for _, result in said]


def _in_words(error: Exception) -> str:
    """A sentence as it is; what is none, like the missing key of a KeyError, with the name of its class."""
    words = str(error)
    return words if words and isinstance(error, ValueError | RuntimeError) else f"{type(error).__name__}: {words}"


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
