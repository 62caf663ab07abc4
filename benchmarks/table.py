"""Markdown tables of results, so that no number is typed by hand."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.aims import aims
from benchmarks.predictions import PREDICTIONS

MIB = "MiB"
BEGIN, END = "<!-- tables begin -->", "<!-- tables end -->"
"""What stands around the tables in a page."""
COLUMNS: dict[tuple[str, str], tuple[str, ...]] = {
    ("seconds", "*"): ("size", "ends", "side", "part", "median", "low", "high", "tokens_per_second"),
    ("ratio", "*"): ("size", "ends", "part", "side", "over", "median", "low", "high"),
    ("memory", "*"): ("size", "ends", "side", "peak", "loaded", "extra"),
    ("floor", "*"): (
        "size", "side", "part", "counted", "gigaflop", "seconds", "floor", "times", "at_own_shapes",
        "times_at_own_shapes", "mfu",
    ),
    ("ceiling", "*"): ("size", "of", "gigaflop_per_second", "gigabyte_per_second"),
    ("work", "*"): ("size", "rho", "counted", "part", "of", "gigaflop", "floor", "at_own_shapes"),
    ("head", "*"): (
        "vocabulary", "hidden", "tokens", "side", "median", "low", "high", "times_faster", "extra", "less_memory",
    ),
    ("length", "*"): ("size", "rows", "new_tokens", "tokens", "median", "milliseconds_per_token", "against_the_least"),
    ("rows", "*"): ("size", "rows", "new_tokens", "tokens", "median", "milliseconds_per_token", "against_the_least"),
    ("rho", "*"): ("size", "vocabulary", "rho", "median", "low", "high", "cheaper_than_all", "by_operations", "extra"),
    ("seconds", "tune"): ("size", "options", "allocator", "median", "low", "high", "rollout", "extra", "best"),
    ("estimate", "*"): ("size", "work", "rho", "gradient_checkpointing", "estimated", "measured", "ratio"),
    ("predicted", "*"): (
        "size", "side", "part", "bound", "predicted", "measured", "ratio", "assumed_share", "reached_share",
    ),
}  # fmt: skip
"""Columns of the table of each kind of line; those that no line has are left out."""

UNITS = {
    "median": "s", "low": "s", "high": "s", "seconds": "s", "floor": "s", "at_own_shapes": "s", "rollout": "s",
    "peak": MIB, "loaded": MIB, "extra": MIB, "estimated": MIB,
}  # fmt: skip
UNITLESS = ("ratio", "estimate")
"""Kinds whose median, low and high are ratios, and none of seconds."""


def read(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Every line of the files that is a result."""
    lines = [line for path in paths for line in path.read_text().splitlines() if line.startswith("{")]
    return [json.loads(line) for line in lines]


def render(results: Sequence[dict[str, Any]]) -> str:
    """Aims, one table per benchmark and kind of line, and where and how they were measured.

    Raises:
        ValueError: For a line that no benchmark of this package prints.
    """
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result in results:
        if "benchmark" not in result or "kind" not in result:
            raise ValueError(f"this is no result of a benchmark: {json.dumps(result)[:200]}")
        groups.setdefault((result["benchmark"], result["kind"]), []).append(result)
    parts = [one(benchmark, kind, lines) for (benchmark, kind), lines in groups.items()]
    return "\n\n".join([aimed(results), *parts, predicted(results), where(results)]) + "\n"


def aimed(results: Sequence[dict[str, Any]]) -> str:
    """What was aimed at, and whether it was reached."""
    rows = [
        "| aim | wanted | measured | lowest to highest | most possible | |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for aim in aims():
        found = aim.find(results)
        sign = "" if aim.wanted is None else f"{'≥' if aim.at_least else '≤'} {cell(aim.wanted)}"
        value, low, high, most = (None,) * 4 if found is None else (found.value, found.low, found.high, found.possible)
        spread = "" if low is None else f"{cell(low)} to {cell(high)}"
        rows.append(f"| {aim.what} | {sign} | {cell(value)} | {spread} | {cell(most)} | {aim.verdict(found)} |")
    return "**Aims**\n\n" + "\n".join(rows)


def predicted(results: Sequence[dict[str, Any]]) -> str:
    """What was expected beside what was measured."""
    rows = ["| what | predicted before measuring | measured | follows from |", "| --- | --- | --- | --- |"]
    for p in PREDICTIONS:
        measured = p.measured(results)
        if measured is not None:
            rows.append(f"| {p.what} | {cell(float(p.value))} | {cell(measured)} | {p.why} |")
    return "**Predicted and measured**\n\n" + "\n".join(rows)


def one(benchmark: str, kind: str, lines: list[dict[str, Any]]) -> str:
    """A table with its title."""
    wanted = COLUMNS.get((kind, benchmark)) or COLUMNS.get((kind, "*"))
    if wanted is None:
        raise ValueError(f"there is no table for lines of the kind {kind!r}")
    columns = [name for name in wanted if any(name in line for line in lines)]
    if all(not line.get("ends") for line in lines):
        columns = [name for name in columns if name != "ends"]
    rows = [[title(name, kind, lines[0]) for name in columns], ["---"] * len(columns)]
    rows += [[cell(line.get(name)) for name in columns] for line in lines]
    return f"**{benchmark}: {kind}**\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows)


def title(name: str, kind: str, line: dict[str, Any]) -> str:
    """A column's name and unit."""
    unit = UNITS.get(name)
    if kind in UNITLESS and unit == "s":
        unit = None
    if name == "measured":
        unit = MIB if kind == "estimate" else "s"
    if name == "predicted":
        unit = "s"
    words = name.replace("_", " ")
    return words if unit is None else f"{words} ({unit})"


def cell(value: Any) -> str:
    """A value for people.

    >>> [cell(v) for v in (None, True, 0.123456, 12.3456, 4321.9, 7, {"a": 1})]
    ['', 'yes', '0.123', '12.3', '4,322', '7', 'a=1']
    """
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    if isinstance(value, dict):
        return ", ".join(f"{name}={item}" for name, item in value.items()) or "default"
    return str(value)


def where(results: Sequence[dict[str, Any]]) -> str:
    """Machine, versions and commands."""
    facts = ("device", "cuda", "processor", "cores", "python", "torch", "transformers", "trl", "lightning")
    machines = dict.fromkeys(
        ", ".join(f"{name} {line[name]}" for name in facts if line.get(name) is not None) for line in results
    )
    commands = dict.fromkeys(line["command"] for line in results if "command" in line)
    loads = [line["load"] for line in results if "load" in line]
    load = [f"Load of the machine while measuring: {min(loads)} to {max(loads)}."] if loads else []
    return "\n".join([*(f"Measured on: {m}." for m in machines), *load, *(f"Command: `{c}`" for c in commands)])


def put(text: str, page: str) -> str:
    """The page with ``text`` between its two markers.

    Raises:
        ValueError: When the page has no markers.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page needs the lines {BEGIN} and {END}, between which tables are put")
    return f"{before}{begin}\n\n{text}\n{end}{after}"


def main(paths: list[str], into: str | None = None) -> None:
    """Print, or put into a page."""
    text = render(read(Path(path) for path in paths))
    if into is None:
        print(text, end="")
    else:
        page = Path(into)
        page.write_text(put(text, page.read_text()))
