"""``lit-rlvr explain``'s estimate of memory against the measured peak."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from benchmarks.compare import THREADS
from benchmarks.models import SIZES, write
from benchmarks.report import emit
from benchmarks.settings import Settings


def cases(settings: Settings) -> Iterator[Settings]:
    """Training with and without gradient checkpointing, on few and on all tokens; and a step with its rollouts."""
    for checkpointing, rho in itertools.product((False, True), (0.2, 1.0)):
        yield replace(settings, work="train", rho=rho, module={"gradient_checkpointing": checkpointing})
    yield replace(settings, work="step")


def compared(settings: Settings) -> dict[str, int]:
    """Estimated and measured bytes, from a process of its own."""
    command = [sys.executable, "-m", "benchmarks.memory_side", settings.written()]
    environment = {**os.environ, **THREADS, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    if done.returncode:
        raise RuntimeError(f"no measurement:\n{done.stderr[-3000:]}")
    result: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return result


def main(name: str, device: str) -> None:
    """Compare and print."""
    size = SIZES[name]
    with tempfile.TemporaryDirectory() as folder:
        for settings in cases(Settings(str(write(size, Path(folder))), size, device)):
            both = compared(settings)
            emit(
                "memory", "estimate", device, size=name, work=settings.work, rho=settings.rho,
                gradient_checkpointing=settings.module.get("gradient_checkpointing", False),
                estimated=both["estimated"] / 2**20, measured=both["measured"] / 2**20,
                ratio=both["estimated"] / both["measured"],
            )  # fmt: skip
