"""Where a problem's parts stand in the rows of a file or dataset."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lit_rlvr.near import did_you_mean
from lit_rlvr.places import Place


@dataclass(frozen=True)
class ProblemSet:
    """One of several held-out sets, which may name its columns otherwise.

    Args:
        path: File or dataset.
        question: Column of the question; null: as in the training problems.
        answer: Column of the reference answer; null: as in the training problems.
    """

    path: Place
    question: str | None = None
    answer: str | None = None


def cell(values: Mapping[str, Any], column: str) -> Any:
    """The value of a column; dots reach into nested values.

    Raises:
        ValueError: When there is no such column.

    >>> cell({"prompt": [{"content": "2+2?"}]}, "prompt.0.content")
    '2+2?'
    """
    if column in values:
        return values[column]
    value: Any = values
    for step in column.split("."):
        if isinstance(value, Mapping) and step in value:
            value = value[step]
        elif isinstance(value, list) and step.isdigit() and int(step) < len(value):
            value = value[int(step)]
        else:
            raise ValueError(f"no column {column!r}")
    return value


def check_text(column: str, value: Any, expected: str = "text") -> None:
    """Refuse what is not text, or blank."""
    if value is None or (isinstance(value, str) and not value.strip()):
        raise ValueError(f"column {column!r} is empty")
    if not isinstance(value, str):
        raise ValueError(f"column {column!r} is of type {type(value).__name__}, expected {expected}")


def plain_answer(column: str, value: Any) -> str:
    """A reference answer as text; numbers are taken as they are written.

    >>> plain_answer("answer", 19), plain_answer("answer", " 1/2 ")
    ('19', ' 1/2 ')
    """
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    check_text(column, value, "text or a finite number")
    return str(value)


def check_columns(place: str, columns: list[str], known: Iterable[str]) -> None:
    """Refuse a column that no row has."""
    known = list(known)
    for column in columns:
        if column not in known and column.partition(".")[0] not in known:
            hint = did_you_mean(column, known) or f"; it has {', '.join(map(repr, known[:12]))}"
            raise ValueError(f"{place} has no column {column!r}{hint}")
