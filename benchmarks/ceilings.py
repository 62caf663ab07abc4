"""What the machine reaches: matrix products of the model's shapes, and memory, measured in a process of its own."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.compare import answer
from benchmarks.gate import Clock
from benchmarks.models import Size
from lit_rlvr.cluster import DEVICES

SECONDS = 0.3
"""Least time that each measurement takes."""
COPIED = 2**28
"""Bytes that are copied: more than any cache holds."""


@dataclass(frozen=True)
class Ceilings:
    """Measured ceilings.

    Args:
        products: Operations per second of matrix products, by what they do in a step.
        bandwidth: Bytes per second, read and written, of a copy in memory.
        nominal: Operations per second that the maker of a known GPU names; 0 where there is none.
    """

    products: dict[str, float]
    bandwidth: float
    nominal: float

    @property
    def best(self) -> float:
        """The fastest of the products."""
        return max(self.products.values())


def shapes(size: Size, tokens: int = 1024, chunk: int = 256) -> dict[str, tuple[int, int, int]]:
    """Rows, inner and outer width of the products that a step is made of."""
    return {
        "body": (tokens, size.hidden, size.feed_forward),
        "body, weight gradient": (size.hidden, tokens, size.feed_forward),
        "body, one token per row": (size.rows, size.hidden, size.feed_forward),
        "head": (chunk, size.hidden, size.vocabulary),
        "head, weight gradient": (size.vocabulary, chunk, size.hidden),
        "head, one token per row": (size.rows, size.hidden, size.vocabulary),
    }


def fastest(clock: Clock, work: Callable[[], Any]) -> float:
    """Least seconds of a piece of work, after a first time that does not count."""
    work()
    taken: list[float] = []
    while sum(taken) < SECONDS or len(taken) < 3:
        start = clock.now()
        work()
        taken.append(clock.since(start))
    return min(taken)


def measure(size: Size, device: str) -> Ceilings:
    """Measure in this process."""
    clock, dtype = Clock(device), torch.float32 if device == "cpu" else torch.bfloat16
    products = {}
    for name, (rows, inner, outer) in shapes(size).items():
        a = torch.randn(rows, inner, dtype=dtype, device=device)
        b = torch.randn(outer, inner, dtype=dtype, device=device).T
        out = torch.empty(rows, outer, dtype=dtype, device=device)
        products[name] = 2.0 * rows * inner * outer / fastest(clock, partial(torch.mm, a, b, out=out))
    source = torch.ones(COPIED // 4, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * COPIED / fastest(clock, lambda: target.copy_(source))
    name = torch.cuda.get_device_name() if device == "cuda" else ""
    return Ceilings(products, bandwidth, next((d.flops for kind, d in DEVICES.items() if kind in name), 0.0))


def measured(size: Size, device: str) -> Ceilings:
    """Measure in a process of its own, with one thread."""
    return Ceilings(**answer("ceilings", json.dumps(asdict(size)), device))


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    print(json.dumps(asdict(measure(Size(**json.loads(sys.argv[1])), sys.argv[2]))))
