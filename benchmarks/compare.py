"""Interleaved comparison of sides that each live in a process of their own."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any

from benchmarks.settings import Settings

THREADS = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")


@dataclass
class Side:
    """A running process.

    Args:
        name: What results call it.
        program: ``ours`` or ``theirs``.
        settings: What it is told.
        environment: More environment variables.
    """

    name: str
    program: str
    settings: Settings
    environment: dict[str, str] = field(default_factory=dict)
    samples: list[dict[str, float]] = field(default_factory=list)
    memory: dict[str, float] = field(default_factory=dict)

    def start(self) -> None:
        """Load model and trainer, and wait at the first gate."""
        self.process = subprocess.Popen(
            [sys.executable, "-m", f"benchmarks.{self.program}", self.settings.written()],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, **THREADS, "HF_HUB_OFFLINE": "1", **self.environment},
        )  # fmt: skip
        self._drain()
        self._read()

    def step(self) -> dict[str, float]:
        """Run one step and return its cost."""
        self._say("go")
        return self._read()

    def stop(self) -> None:
        """End the process and keep what it says of its memory."""
        self._say("stop")
        self.memory = self._read()
        self.process.wait(60)

    def _say(self, word: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended early:\n" + "".join(self.errors[-30:]))
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _drain(self) -> None:
        """Keep what the process writes to standard error, so that its pipe never fills."""
        import threading

        self.errors: list[str] = []
        stream = self.process.stderr
        assert stream is not None
        threading.Thread(target=lambda: self.errors.extend(stream), daemon=True).start()


def interleave(sides: list[Side], repeats: int, warm: int = 1) -> None:
    """Run A B A B ...; the first ``warm`` rounds do not count."""
    for side in sides:
        side.start()
    for number in range(warm + repeats):
        for side in sides:
            cost = side.step()
            if number >= warm:
                side.samples.append(cost)
    for side in sides:
        side.stop()


def median(side: Side, part: str) -> float:
    """Median seconds of a part of the step."""
    return statistics.median(costs(side, part))


def costs(side: Side, part: str) -> list[float]:
    """Seconds of a part in every round; ``train`` is what is not rollout."""
    if part == "train":
        return [s["step"] - s["rollout"] for s in side.samples]
    return [s[part] for s in side.samples]


def ratios(slow: Side, fast: Side, part: str) -> dict[str, float]:
    """Median ratio of the rounds, and its spread."""
    each = [a / b for a, b in zip(costs(slow, part), costs(fast, part), strict=True)]
    return {"ratio": statistics.median(each), "low": min(each), "high": max(each)}
