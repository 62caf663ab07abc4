"""Learning curves: a panel for each arm, with the baseline in grey."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from lit_rlvr.compare.measures import History

GREY, COLOUR = "0.45", "tab:blue"
COLUMNS = 4


@dataclass(frozen=True)
class Curve:
    """Mean over seeds at each optimiser step, and one standard deviation around it (0 where one seed has a value)."""

    steps: list[int]
    mean: list[float]
    spread: list[float]


def curve(histories: Sequence[History], metric: str) -> Curve:
    """A metric over several runs; at a step that only some have logged, over those.

    >>> curve([{"r": {1: 0.0, 3: 1.0}}, {"r": {1: 2.0}}], "r").mean
    [1.0, 1.0]
    """
    points: dict[int, list[float]] = {}
    for history in histories:
        for step, value in history.get(metric, {}).items():
            points.setdefault(step, []).append(value)
    steps = sorted(points)
    spread = [statistics.stdev(points[step]) if len(points[step]) > 1 else 0.0 for step in steps]
    return Curve(steps, [statistics.fmean(points[step]) for step in steps], spread)


def plot(file: Path, metric: str, histories: Mapping[str, Sequence[History]], baseline: str) -> bool:
    """Write a PNG of ``metric``; False, and no file, when no run has logged it."""
    from matplotlib.figure import Figure

    curves = {arm: curve(runs, metric) for arm, runs in histories.items()}
    if not any(found.steps for found in curves.values()):
        return False
    others = [arm for arm in curves if arm != baseline] or [baseline]
    columns = min(COLUMNS, len(others))
    rows = ceil(len(others) / columns)
    figure = Figure(figsize=(max(3.2 * columns, 6.0), 2.4 * rows + 0.6), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
    for panel, arm in zip(panels, others, strict=False):
        _draw(panel, curves[baseline], baseline, GREY)
        if arm != baseline:
            _draw(panel, curves[arm], arm, COLOUR)
        panel.set_title(f"{arm} ({len(histories[arm])} seeds)", fontsize=9)
        panel.grid(alpha=0.3)
    for panel in figure.axes[len(others) :]:
        panel.set_visible(False)
    figure.suptitle(f"{metric}; grey: {baseline}; bands: one standard deviation over seeds", fontsize=10)
    figure.supxlabel("optimiser steps", fontsize=9)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    return True


def _draw(panel: Any, found: Curve, label: str, colour: str) -> None:
    panel.plot(found.steps, found.mean, color=colour, label=label, linewidth=1.2)
    low = [m - s for m, s in zip(found.mean, found.spread, strict=True)]
    high = [m + s for m, s in zip(found.mean, found.spread, strict=True)]
    panel.fill_between(found.steps, low, high, color=colour, alpha=0.2, linewidth=0)


def file_name(metric: str) -> str:
    """A metric's name as a file's.

    >>> file_name("rollout/reward")
    'curve_rollout_reward.png'
    """
    return f"curve_{re.sub(r'[^A-Za-z0-9]+', '_', metric)}.png"
