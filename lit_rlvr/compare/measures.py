"""What is compared about a run: a held-out result, the last values of a metric, or the steps until it is reached."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from lit_rlvr.compare.statistics import Better
from lit_rlvr.near import did_you_mean

REPORT, METRICS = "report.json", "metrics/metrics.csv"
AFTER = "after RLVR"
HIGHER, LOWER = ("mean_at_", "maj_at_", "pass_at_", "reward", "correct"), ("truncated",)
Kind = Literal["held_out", "last", "steps_to"]
KINDS: tuple[Kind, ...] = get_args(Kind)

History = dict[str, dict[int, float]]
"""Value of each metric by optimiser step."""


@dataclass(frozen=True)
class Result:
    """What a finished run has left: its last held-out evaluation, and every metric by optimiser step."""

    held_out: dict[str, float]
    history: History


@dataclass(frozen=True)
class Measure:
    """One number of a run.

    Args:
        kind: ``held_out``: a result of the evaluation after training; ``last``: mean of a metric's last ``window``
            values; ``steps_to``: first optimiser step at which the mean of the last ``window`` values so far is at
            least ``threshold``.
        metric: Name of the result or metric.
        threshold: What ``steps_to`` waits for.
        window: Number of logged values that are averaged.
        better: Which values are better; None: neither.
    """

    kind: Kind
    metric: str
    threshold: float = math.nan
    window: int = 5
    better: Better = None

    @property
    def name(self) -> str:
        """Heading in tables."""
        return {
            "held_out": self.metric,
            "last": f"last {self.metric}",
            "steps_to": f"steps to {self.metric} {self.threshold:g}",
        }[self.kind]

    def value(self, result: Result) -> float | None:
        """The run's number; None when the run does not have it, infinity when ``steps_to`` waited in vain."""
        if self.kind == "held_out":
            value = result.held_out.get(self.metric, math.nan)
            return None if math.isnan(value) else value
        points = sorted(result.history.get(self.metric, {}).items())
        if not points:
            return None
        values = [value for _, value in points]
        if self.kind == "last":
            last = values[-self.window :]
            return sum(last) / len(last)
        for end in range(self.window, len(points) + 1):
            if sum(values[end - self.window : end]) / self.window >= self.threshold:
                return float(points[end - 1][0])
        return math.inf

    def known(self, result: Result) -> list[str]:
        """The names that a run has for this kind of measure."""
        return sorted(result.held_out if self.kind == "held_out" else result.history)


def read_measure(given: Any, where: str) -> Measure:
    """A measure from YAML: a name, or a mapping with ``held_out``, ``last``, or ``steps_to`` and ``metric``.

    Raises:
        ValueError: For anything else.
    """
    if isinstance(given, str):
        return Measure("held_out", given, better=direction(given))
    known = (*KINDS, "metric", "window", "better")
    if not isinstance(given, Mapping):
        raise ValueError(f"{where} must be the name of a held-out result, or a mapping with one of {', '.join(KINDS)}")
    for key in given:
        if key not in known:
            raise ValueError(f"{where} has no option {key!r}{did_you_mean(str(key), known)}")
    named = set(given)
    kinds: list[Kind] = [kind for kind in KINDS if kind in named]
    if len(kinds) != 1:
        raise ValueError(f"{where} needs exactly one of {', '.join(KINDS)}")
    kind = kinds[0]
    if ("metric" in given) != (kind == "steps_to"):
        reason = "needs a `metric`" if kind == "steps_to" else f"has the metric's name as `{kind}`, and no `metric`"
        raise ValueError(f"{where} {reason}")
    metric = given["metric"] if kind == "steps_to" else given[kind]
    window = given.get("window", 5)
    if kind == "held_out" and "window" in given:
        raise ValueError(f"{where}: a held-out result is one number and has no window")
    if not isinstance(metric, str):
        raise ValueError(f"{where} needs the name of a metric, got {metric!r}")
    if not isinstance(window, int) or window < 1:
        raise ValueError(f"{where}.window must be a whole number of at least 1, got {window!r}")
    threshold = given[kind] if kind == "steps_to" else math.nan
    if not isinstance(threshold, int | float):
        raise ValueError(f"{where}.steps_to must be a number, got {threshold!r}")
    better = given.get("better", "lower" if kind == "steps_to" else direction(metric))
    if better not in ("higher", "lower", None):
        raise ValueError(f"{where}.better must be higher, lower or null, got {better!r}")
    return Measure(kind, metric, float(threshold), window, better)


def direction(metric: str) -> Better:
    """Which values of a metric are better, as far as its name tells.

    >>> direction("greedy/mean_at_1"), direction("sampled/truncated"), direction("rollout/entropy")
    ('higher', 'lower', None)
    """
    last = metric.rpartition("/")[2]
    return "higher" if last.startswith(HIGHER) else "lower" if last.startswith(LOWER) else None


def read_result(folder: Path) -> Result:
    """What the run in ``folder`` has left.

    Raises:
        ValueError: When the report cannot be read.
    """
    try:
        report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
        held_out = report["evaluations"][AFTER]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder / REPORT} cannot be read: {error}") from error
    return Result(held_out, read_history(folder / METRICS))


def read_history(file: Path) -> History:
    """Lightning's CSV of metrics; a step may have several rows, each with some of the columns. Empty without a file."""
    history: History = {}
    if not file.exists():
        return history
    with file.open(encoding="utf-8", newline="") as rows:
        for row in csv.DictReader(rows):
            step = int(row.pop("step"))
            for name, value in row.items():
                if value:
                    history.setdefault(name, {})[step] = float(value)
    return history
