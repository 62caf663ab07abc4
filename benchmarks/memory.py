"""``lit-rlvr explain``'s estimate of memory against the measured peak."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from benchmarks.compare import answer
from benchmarks.models import SIZES, write
from benchmarks.report import emit
from benchmarks.settings import Settings


def cases(settings: Settings) -> Iterator[Settings]:
    """Training with and without gradient checkpointing, on few and on all tokens; and a step with its rollouts."""
    for checkpointing, rho in itertools.product((False, True), (0.2, 1.0)):
        yield replace(settings, work="train", rho=rho, module={"gradient_checkpointing": checkpointing})
    yield replace(settings, work="step")


def main(name: str, device: str, most: int | None = None) -> None:
    """Compare and print.

    Args:
        name: The model.
        device: ``cpu`` or ``cuda``.
        most: Cases at the most; null: all.
    """
    size = SIZES[name]
    with tempfile.TemporaryDirectory() as folder:
        every = list(cases(Settings(str(write(size, Path(folder))), size, device)))[:most]
        with ThreadPoolExecutor(2 if device == "cpu" else 1) as pool:  # bytes are no other for a busy machine
            results = list(pool.map(lambda case: answer("memory_side", case.written()), every))
        for settings, both in zip(every, results, strict=True):
            emit(
                "memory", "estimate", device, size=name, work=settings.work, rho=settings.rho,
                gradient_checkpointing=settings.module.get("gradient_checkpointing", False),
                estimated=both["estimated"] / 2**20, measured=both["measured"] / 2**20,
                ratio=both["estimated"] / both["measured"],
            )  # fmt: skip
