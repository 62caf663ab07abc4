"""A whole RLVR step against TRL's GRPOTrainer, and its two parts: rollout and training."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.compare import Side, interleave, median, ratios
from benchmarks.models import SIZES, write
from benchmarks.report import emit
from benchmarks.settings import Settings

ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
    "MALLOC_TOP_PAD_": "67108864",
}
"""glibc keeps freed memory instead of returning it to the system and faulting it in again."""


def sides(name: str, folder: str, device: str, which: list[str]) -> list[Side]:
    """The sides of the comparison by name, ours first."""
    settings = Settings(folder, SIZES[name], device)
    tuned = {"S": {"per_device_train_batch_size": 16}, "M": {"per_device_train_batch_size": 8}}.get(name, {})
    every = {
        "lit-rlvr": Side("lit-rlvr", "ours", settings),
        "lit-rlvr, all tokens": Side("lit-rlvr, all tokens", "ours", replace(settings, rho=1.0)),
        "TRL": Side("TRL", "theirs", settings),
        "TRL tuned": Side("TRL tuned", "theirs", replace(settings, trl=tuned), ALLOCATOR),
        "TRL, checkpointing": Side(
            "TRL, checkpointing", "theirs", replace(settings, trl={"gradient_checkpointing": True})
        ),
    }
    return [every[side] for side in which]


def main(name: str, device: str, repeats: int, which: list[str], ends: int) -> None:
    """Compare and print."""
    with tempfile.TemporaryDirectory() as folder:
        write(SIZES[name], Path(folder), ends)
        run = sides(name, folder, device, which)
        interleave(run, repeats)
        first = run[0]
        for side in run:
            parts: dict[str, Any] = {part: median(side, part) for part in ("step", "rollout", "train")}
            emit("step", device, size=name, side=side.name, ends=ends, repeats=repeats, **parts, **side.memory)
        for side in run[1:]:
            for part in ("step", "rollout", "train"):
                emit(part, device, size=name, of=f"{side.name} / {first.name}", ends=ends, **ratios(side, first, part))
