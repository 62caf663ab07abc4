"""What the machine reaches: matrix products of the model's shapes, and memory, measured in a process of its own."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.compare import answer
from benchmarks.gate import Clock
from benchmarks.models import Size, dtype_on
from benchmarks.settings import MICRO_TOKENS
from lit_rlvr.head import CHUNK_ROWS
from lit_rlvr.machines import DEVICES
from lit_rlvr.matmul import packed_linears

SECONDS = 0.3
"""Least time that each measurement takes."""
BACK_TO_BACK = 0.005
"""Least time between two looks at the clock: a GPU takes longer to launch a small product than to compute it, and the
clock of a process is coarse."""
COPIED = 2**28
"""Bytes that are copied: more than any cache holds."""
SQUARE = {"cpu": 1024, "cuda": 8192}
"""Width of two square matrices whose product fills the device."""
PACKED = ", packed weights"
"""Added to the name of a product whose weights are in the order of oneDNN's kernels, which only CPUs have."""


@dataclass(frozen=True)
class Ceilings:
    """Measured ceilings.

    Args:
        products: Operations per second of matrix products, by what they do in a step; with packed weights, where that
            is possible, as products of their own.
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

    def rate(self, name: str) -> float:
        """Of a product, in the faster of its ways."""
        return max(self.products[name], self.products.get(name + PACKED, 0.0))


def shapes(size: Size, device: str = "cpu") -> dict[str, tuple[int, int, int]]:
    """Rows, inner and outer width of the products that a step is made of, and of a large one."""
    tokens, chunk, square = MICRO_TOKENS[device], CHUNK_ROWS[device], SQUARE[device]
    return {
        "square": (square, square, square),
        "body": (tokens, size.hidden, size.feed_forward),
        "body, weight gradient": (size.hidden, tokens, size.feed_forward),
        "body, one token per row": (size.rows, size.hidden, size.feed_forward),
        "head": (chunk, size.hidden, size.vocabulary),
        "head, weight gradient": (size.vocabulary, chunk, size.hidden),
        "head, one token per row": (size.rows, size.hidden, size.vocabulary),
    }


def fastest(clock: Clock, work: Callable[[], Any]) -> float:
    """Least seconds of a piece of work, of many back to back if it is small, after a first time that does not count."""

    def taken(times: int) -> float:
        start = clock.now()
        for _ in range(times):
            work()
        return clock.since(start)

    work()
    times = 1
    while taken(times) < BACK_TO_BACK:
        times *= 2
    each: list[float] = []
    while sum(each) < SECONDS or len(each) < 3:
        each.append(taken(times))
    return min(each) / times


def measure(size: Size, device: str) -> Ceilings:
    """Measure in this process."""
    clock, dtype = Clock(device), getattr(torch, dtype_on(device))
    products = {}
    for name, (rows, inner, outer) in shapes(size, device).items():
        a = torch.randn(rows, inner, dtype=dtype, device=device)
        layer = nn.Linear(inner, outer, bias=False, dtype=dtype, device=device)
        out = torch.empty(rows, outer, dtype=dtype, device=device)
        count = 2.0 * rows * inner * outer
        products[name] = count / fastest(clock, partial(torch.mm, a, layer.weight.T, out=out))
        with packed_linears(layer) as packed:  # of none on a GPU
            if packed and not name.endswith("gradient"):  # what it is multiplied with there changes every time
                products[name + PACKED] = count / fastest(clock, partial(layer, a))
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
