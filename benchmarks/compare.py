"""Interleaved comparison of sides that each live in a process of their own."""

from __future__ import annotations

import json
import statistics
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from benchmarks.processes import launch


class Told(Protocol):
    """Settings that can be handed to another process."""

    @property
    def device(self) -> str:
        """``cpu`` or ``cuda``."""
        ...

    def written(self) -> str:
        """As text."""
        ...


@dataclass
class Side:
    """A running process.

    Args:
        name: What results call it.
        program: A module of this package: ``ours``, ``theirs`` or ``head_side``.
        settings: What it is told.
        environment: More environment variables.
    """

    name: str
    program: str
    settings: Told
    environment: dict[str, str] = field(default_factory=dict)
    samples: list[dict[str, float]] = field(default_factory=list)
    memory: dict[str, float] = field(default_factory=dict)
    process: Any = None

    def start(self) -> None:
        """Begin to load model and trainer."""
        self.process = launch(self.program, self.settings.written(), environment=self.environment)
        self._drain()

    def ready(self) -> None:
        """Wait until it stands at the first gate."""
        self._read()

    def step(self) -> dict[str, float]:
        """Run one step and return its cost."""
        self._say("go")
        return self._read()

    def stop(self) -> None:
        """End the process and keep what it says of its memory; of several processes, the most."""
        self._say("stop")
        self.memory = {name: max(value, self.memory.get(name, value)) for name, value in self._read().items()}
        self.process.wait(60)

    def end(self) -> None:
        """Make sure that the process is gone, whatever happened."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def _say(self, word: str) -> None:
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()

    def _read(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            self.drain.join(5)
            raise RuntimeError(f"{self.name} ended early:\n" + "".join(self.errors[-30:]))
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _drain(self) -> None:
        """Keep what the process writes to standard error, so that its pipe never fills."""
        self.errors: list[str] = []
        self.drain = threading.Thread(target=lambda: self.errors.extend(self.process.stderr), daemon=True)
        self.drain.start()


def interleave(sides: list[Side], repeats: int, warm: int = 1, visits: int = 2) -> None:
    """Measure ``repeats`` steps of every side; the first ``warm`` steps of a process do not count.

    On a CPU the sides live side by side and take turns step by step. On a GPU there is one at a time, since each keeps
    weights, optimizer state and freed memory while it waits: a side comes, takes its share of the steps, and goes. The
    order is turned round every time, A B B A, so that a steady drift of the machine's speed cancels.

    Args:
        sides: What is compared.
        repeats: Steps that count.
        warm: Steps before them.
        visits: How often a side comes to a GPU; each time it starts a process and loads the model.
    """
    try:
        if any(side.settings.device == "cuda" for side in sides):
            _one_at_a_time(sides, shares(repeats, visits), warm)
        else:
            _side_by_side(sides, repeats, warm)
    finally:
        for side in sides:
            side.end()


def _side_by_side(sides: list[Side], repeats: int, warm: int) -> None:
    """All load at the same time, and take turns."""
    for side in sides:
        side.start()
    for side in sides:
        side.ready()
    for number in range(-warm, repeats):
        for side in turned(sides, number):
            cost = side.step()
            if number >= 0:
                side.samples.append(cost)
    for side in sides:
        side.stop()


def _one_at_a_time(sides: list[Side], steps: list[int], warm: int) -> None:
    """A side is gone, with all of its memory, before the next one starts."""
    for number, count in enumerate(steps):
        for side in turned(sides, number):
            side.start()
            side.ready()
            for _ in range(warm):
                side.step()
            side.samples += [side.step() for _ in range(count)]
            side.stop()


def turned(sides: list[Side], number: int) -> list[Side]:
    """The order of a round: as they are given, or the other way round."""
    return sides if number % 2 == 0 else sides[::-1]


def shares(repeats: int, visits: int) -> list[int]:
    """How many steps each visit takes: nearly the same, and at least one.

    >>> shares(5, 2), shares(1, 2)
    ([3, 2], [1])
    """
    visits = min(visits, repeats)
    return [len(range(visit, repeats, visits)) for visit in range(visits)]


def costs(side: Side, part: str) -> list[float]:
    """Seconds of a part in every round; ``train`` is what is not rollout."""
    if part == "train":
        return [s["step"] - s.get("rollout", 0.0) for s in side.samples]
    return [s[part] for s in side.samples]


def rates(side: Side) -> list[float]:
    """Sampled tokens per second in every round."""
    return [s["tokens"] / s["rollout"] for s in side.samples]


def spread(values: list[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def median(side: Side, part: str) -> float:
    """Median seconds of a part of the step."""
    return statistics.median(costs(side, part))


def per_token(side: Side, part: str) -> list[float]:
    """Seconds per response token of a part in every round: sides that sample draw responses of their own lengths."""
    return [cost / sample["tokens"] for cost, sample in zip(costs(side, part), side.samples, strict=True)]


def ratios(slow: Side, fast: Side, part: str) -> dict[str, float]:
    """Median ratio of the rounds, and its spread: how many times as long a response token takes the first."""
    return of_rounds(slow, fast, lambda side: per_token(side, part))


def of_rounds(above: Side, below: Side, measure: Callable[[Side], list[float]]) -> dict[str, float]:
    """Median, smallest and largest ratio of a measure in the same rounds."""
    return spread([a / b for a, b in zip(measure(above), measure(below), strict=True)])


def answer(program: str, *arguments: str) -> Any:
    """The JSON that a program prints as its last line.

    Raises:
        RuntimeError: When it fails, with the end of what it wrote to standard error.
    """
    process = launch(program, *arguments)
    try:
        process.stdin.close()
        errors: list[str] = []
        drain = threading.Thread(target=lambda: errors.extend(process.stderr), daemon=True)
        drain.start()
        lines = list(process.stdout)
        if process.wait(60):
            drain.join(5)
            raise RuntimeError(f"{program} failed:\n" + "".join(errors[-30:]))
        return json.loads(lines[-1])
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
