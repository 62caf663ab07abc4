"""TRL's options that change its speed, tried one by one, so that it is compared at its best."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.compare import Side, costs, interleave, median, spread
from benchmarks.models import SIZES, write
from benchmarks.report import emit
from benchmarks.settings import Settings
from benchmarks.step import ALLOCATOR

CACHES: tuple[dict[str, Any], ...] = ({}, {"cache_implementation": "static"})


def candidates(rows: int, batches: tuple[int, ...] = (4, 8, 16, 32)) -> list[dict[str, Any]]:
    """Batch sizes that divide a step's rows, and with the usual one each kind of cache."""
    sizes = [batch for batch in batches if batch <= rows and rows % batch == 0]
    usual = 8 if 8 in sizes else sizes[-1]
    return [
        {"per_device_train_batch_size": batch, **cache}
        for batch in sizes
        for cache in CACHES
        if not cache or batch == usual
    ]


def main(name: str, device: str, repeats: int) -> None:
    """Try each and print; the fastest is marked."""
    size = SIZES[name]
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(str(write(size, Path(folder))), size, device)
        plain = Side("TRL", "theirs", settings)
        environment = ALLOCATOR if device == "cpu" else {}
        tried = [
            Side(str(number), "theirs", replace(settings, trl=options), environment)
            for number, options in enumerate(candidates(size.rows))
        ]
        interleave([plain, *tried], repeats)
    best = min(tried, key=lambda side: median(side, "step"))
    emit("tune", "seconds", device, size=name, options={}, allocator=False, **spread(costs(plain, "step")))
    for side in tried:
        assert isinstance(side.settings, Settings)
        emit(
            "tune", "seconds", device, size=name, options=side.settings.trl, allocator=bool(environment),
            rollout=median(side, "rollout"), best=side is best, extra=side.memory["extra"],
            **spread(costs(side, "step")),
        )  # fmt: skip
