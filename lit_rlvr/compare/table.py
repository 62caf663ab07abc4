"""The comparison as a table: Markdown to read, CSV and JSON to go on with."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lit_rlvr.compare.measures import Measure, Result
from lit_rlvr.compare.runs import Run
from lit_rlvr.compare.spec import Comparison
from lit_rlvr.compare.statistics import Difference, Summary, paired_difference, summarise, verdict
from lit_rlvr.near import did_you_mean

Results = Mapping[str, Mapping[int, Result]]
"""What finished runs have left, by arm and seed."""


@dataclass(frozen=True)
class Row:
    """One arm in one measure.

    Args:
        arm: Its name.
        values: The measure by seed; infinity where ``steps_to`` waited in vain.
        summary: Of the finite values.
        difference: To the baseline; None for the baseline itself and where there is none.
        verdict: In words; empty for the baseline.
    """

    arm: str
    values: Mapping[int, float]
    summary: Summary
    difference: Difference | None
    verdict: str

    @property
    def missed(self) -> int:
        """Runs that never reached the threshold."""
        return sum(math.isinf(value) for value in self.values.values())


@dataclass(frozen=True)
class Table:
    """All arms in all measures, and the runs that are in none of them."""

    comparison: Comparison
    command: str
    measures: Sequence[tuple[Measure, Sequence[Row]]]
    failed: Sequence[Run]
    missing: Sequence[Run]
    without_value: Sequence[str]


def make_table(comparison: Comparison, runs: Sequence[Run], results: Results, command: str) -> Table:
    """Compare everything that there is.

    Raises:
        ValueError: When no run has a measure.
    """
    measures, without = [], []
    for measure in comparison.measures:
        values: dict[str, dict[int, float]] = {}
        for arm in comparison.arms:
            found = {seed: measure.value(result) for seed, result in results.get(arm, {}).items()}
            values[arm] = {seed: value for seed, value in found.items() if value is not None}
            without += [f"{arm} seed {seed} has no {measure.metric}" for seed, v in found.items() if v is None]
        if any(results.values()) and not any(values.values()):
            raise ValueError(unknown(measure, [r for by_seed in results.values() for r in by_seed.values()]))
        measures.append((measure, compare(values, comparison.baseline, measure, comparison.confidence)))
    states = [(run, run.state()) for run in runs]
    failed, missing = ([run for run, state in states if state == wanted] for wanted in ("failed", "new"))
    return Table(comparison, command, measures, failed, missing, without)


def compare(values: Mapping[str, Mapping[int, float]], baseline: str, measure: Measure, confidence: float) -> list[Row]:
    """A row for each arm.

    An interval is computed only where every run reached the threshold: leaving out those that did not would flatter the
    arm that fails on the hard seeds.
    """
    base = values[baseline]
    rows = []
    for arm, own in values.items():
        finite = [value for value in own.values() if math.isfinite(value)]
        if arm == baseline:
            rows.append(Row(arm, own, summarise(finite), None, ""))
            continue
        if any(map(math.isinf, [*own.values(), *base.values()])):
            reached = sum(map(math.isfinite, base.values()))
            words = f"reached by {len(finite)} of {len(own)}, baseline {reached} of {len(base)}: no interval"
            rows.append(Row(arm, own, summarise(finite), None, words))
            continue
        difference = paired_difference(own, base, confidence)
        rows.append(Row(arm, own, summarise(finite), difference, verdict(difference, measure.better)))
    return rows


def unknown(measure: Measure, results: Iterable[Result]) -> str:
    """A sentence about a measure that no run has."""
    known = sorted({name for result in results for name in measure.known(result)})
    hint = did_you_mean(measure.metric, known) or f"; there are {', '.join(known)}"
    return f"no run has {measure.metric!r}{hint}"


def markdown(table: Table) -> str:
    """The whole text: a table per measure, then what is to be known about it."""
    comparison = table.comparison
    parts = [f"# {comparison.name}", f"`{table.command}`"]
    for measure, rows in table.measures:
        digits = decimals([row.summary.mean for row in rows])
        parts += [f"## {measure.name}", _grid(_heading(comparison), [_cells(row, digits) for row in rows])]
    parts += ["\n".join(f"- {note}" for note in notes(table))]
    if table.failed:
        parts += ["## Failed runs", *map(_failure, table.failed)]
    return "\n\n".join(parts) + "\n"


def notes(table: Table) -> list[str]:
    """What a reader of the numbers has to know."""
    comparison = table.comparison
    others, percent = len(comparison.arms) - 1, f"{100 * comparison.confidence:g} %"
    said = [
        f"n: seeds; sd: standard deviation over seeds; difference: mean of arm minus {comparison.baseline}, paired by "
        f"seed, with its {percent} confidence interval (Student's t).",
        '"no difference found" means that the interval contains 0, not that the arms are equal.',
    ]
    if others > 1:
        chance = others * (1 - comparison.confidence)
        said += [
            f"{others} arms are compared in each table: if none differed from {comparison.baseline}, {chance:.1g} "
            "intervals would be expected to leave 0 out by chance."
        ]
    if any(row.missed for _, rows in table.measures for row in rows):
        said += ["A run that never reached the threshold is counted, and is not in the mean."]
    planned = len(comparison.arms) * len(comparison.seeds)
    if table.failed:
        said += [f"{len(table.failed)} of {planned} runs failed and are in no number; they are listed below."]
    if table.missing:
        names = ", ".join(map(str, table.missing))
        said += [f"{len(table.missing)} of {planned} runs are not done yet: {names}."]
    return said + [f"{line}." for line in table.without_value]


def decimals(means: Iterable[float | None]) -> int:
    """Decimals that give the largest mean three significant digits, but at least one.

    >>> decimals([0.512, None]), decimals([0.0123]), decimals([141.0])
    (3, 4, 1)
    """
    largest = max((abs(mean) for mean in means if mean), default=1.0)
    return min(max(1, 2 - math.floor(math.log10(largest))), 9)


def _heading(comparison: Comparison) -> list[str]:
    difference, interval = f"difference to {comparison.baseline}", f"{100 * comparison.confidence:g} % interval"
    return ["arm", "n", "mean", "sd", difference, interval, "verdict"]


def _cells(row: Row, digits: int) -> list[str]:
    def number(value: float | None, sign: str = "") -> str:
        return "–" if value is None else f"{value:{sign}.{digits}f}"

    n = str(len(row.values)) + (f" ({row.missed} never)" if row.missed else "")
    mean, interval, found = None, "–", row.difference
    if found is not None:
        mean = found.mean
        if found.low is not None:
            interval = f"[{number(found.low, '+')}, {number(found.high, '+')}]"
    return [row.arm, n, number(row.summary.mean), number(row.summary.sd), number(mean, "+"), interval, row.verdict]


def _grid(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown that is aligned in a terminal, too: texts to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(heading, *rows, strict=True)]
    left = (0, len(heading) - 1)

    def line(cells: Sequence[str]) -> str:
        padded = [c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return f"| {' | '.join(padded)} |"

    rule = "|".join("-" * (w + 2) if i in left else "-" * (w + 1) + ":" for i, w in enumerate(widths))
    return "\n".join([line(heading), f"|{rule}|", *map(line, rows)])


def _failure(run: Run) -> str:
    """A failed run with the end of its log."""
    code = run.code or 0
    how = f"signal {-code}" if code < 0 else f"exit code {code}" if code else "no report"
    lines = "\n".join(f"    {line}" for line in run.last_lines() or ["(it printed nothing)"])
    return f"{run}, {how}, `{run.log}`:\n\n{lines}"


def to_csv(table: Table) -> str:
    """A line for each measure and arm."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["measure", "arm", "n", "never", "mean", "sd", "pairs", "difference", "low", "high", "verdict"])
    for measure, rows in table.measures:
        for row in rows:
            d = row.difference
            numbers = ["", "", "", ""] if d is None else [d.n, d.mean, d.low, d.high]
            own = [len(row.values), row.missed, row.summary.mean, row.summary.sd]
            writer.writerow([measure.name, row.arm, *own, *numbers, row.verdict])
    return out.getvalue()


def to_json(table: Table) -> dict[str, Any]:
    """Everything, the values of single runs included; null is a run that never reached the threshold."""
    comparison = table.comparison
    return {
        "name": comparison.name, "command": table.command, "baseline": comparison.baseline,
        "confidence": comparison.confidence, "seeds": list(comparison.seeds),
        "measures": {measure.name: {row.arm: _row(row) for row in rows} for measure, rows in table.measures},
        "failed": [
            {"arm": run.arm, "seed": run.seed, "code": run.code, "log": run.last_lines()} for run in table.failed
        ],
        "not done": [{"arm": run.arm, "seed": run.seed} for run in table.missing],
        "without a value": list(table.without_value),
    }  # fmt: skip


def _row(row: Row) -> dict[str, Any]:
    d = row.difference
    return {
        "values": {str(seed): value if math.isfinite(value) else None for seed, value in row.values.items()},
        "n": len(row.values), "never": row.missed, "mean": row.summary.mean, "sd": row.summary.sd,
        "difference": None if d is None else {"pairs": d.n, "mean": d.mean, "low": d.low, "high": d.high},
        "verdict": row.verdict,
    }  # fmt: skip
