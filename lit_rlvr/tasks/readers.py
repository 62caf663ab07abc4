"""Reads rows of problem files and of Hugging Face datasets; every row knows where it stands."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_rlvr.near import did_you_mean
from lit_rlvr.places import existing_file

HUB = "hf:"
HUB_SPLITS = {"train": "train", "val": "validation", "test": "test"}


class UnreachableError(ValueError):
    """A dataset of the hub that cannot be had here and now."""


@dataclass(frozen=True)
class Row:
    """One row of a file.

    Args:
        source: Where it stands: file and line, or dataset and row.
        values: Its columns.
        problem: Why it cannot be used, or ``None``.
    """

    source: str
    values: dict[str, Any]
    problem: str | None = None


def read_rows(place: str, split: str) -> Iterator[Row]:
    """The rows of a file, or of a dataset of the Hugging Face hub; broken ones carry their problem.

    Args:
        place: A path, or ``hf:NAME[:CONFIG][@SPLIT]``.
        split: What it is read for; names the dataset's split where ``place`` does not.

    Raises:
        ValueError: When there is no such file, or it cannot be read at all.
        UnreachableError: When a dataset cannot be loaded from the hub or its cache.
    """
    if place.startswith(HUB):
        yield from _read_hub(place, split)
        return
    reader = reader_of(place)
    yield from reader(existing_file(place, READERS))


def reader_of(place: str) -> Callable[[Path], Iterator[Row]]:
    """The reader for a file's suffix.

    Raises:
        ValueError: For an unknown one.
    """
    suffix = Path(place).suffix
    if suffix.lower() not in READERS:
        hint = did_you_mean(suffix, READERS) or f"; known are {', '.join(READERS)}, and hf:NAME for a dataset"
        raise ValueError(f"cannot read {place}: unknown suffix {suffix!r}{hint}")
    return READERS[suffix.lower()]


def _object(source: str, value: Any) -> Row:
    """A row from a JSON value."""
    if isinstance(value, dict):
        return Row(source, value)
    return Row(source, {}, f"expected an object with columns, got {json.dumps(value)[:40]}")


def _read_json_lines(file: Path) -> Iterator[Row]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            source = f"{file.name}:{number}"
            try:
                text = line.decode("utf-8-sig").strip()
                if text:
                    yield _object(source, json.loads(text))
            except json.JSONDecodeError as error:
                yield Row(source, {}, f"no valid JSON: {error.msg} (character {error.pos + 1})")
            except (ValueError, RecursionError) as error:
                yield Row(source, {}, f"no valid JSON: {error}")


def _read_json(file: Path) -> Iterator[Row]:
    """The objects of a list, one by one, so that each knows its line."""
    text, decoder = _text(file), json.JSONDecoder()
    position = _skip_space(text, 0)
    if text[position : position + 1] != "[":
        raise ValueError(f"{file} must hold a list of objects, [{{...}}, {{...}}]; one object per line is .jsonl")
    line, counted, separator = 1, 0, "["
    while True:
        position = _skip_space(text, position + 1)
        line, counted = line + text.count("\n", counted, position), position
        if separator == "[" and text[position : position + 1] == "]":
            return
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file}:{line} is no valid JSON: {error}") from error
        yield _object(f"{file.name}:{line}", value)
        position = _skip_space(text, position)
        separator = text[position : position + 1]
        if separator == "]":
            return
        if separator != ",":
            line += text.count("\n", counted, position)
            raise ValueError(f"{file}:{line} is no valid JSON: expected a comma or ] after a row")


def _skip_space(text: str, position: int) -> int:
    while text[position : position + 1] in (" ", "\t", "\n", "\r"):
        position += 1
    return position


def _read_table(file: Path, delimiter: str) -> Iterator[Row]:
    """Comma- or tab-separated values, the first line naming the columns; a quoted value may go over several lines."""
    reader = csv.reader(io.StringIO(_text(file), newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        source = f"{file.name}:{reader.line_num + 1}"
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield Row(source, {}, f"no valid table row: {error}")
            continue
        if header is None:
            header = values
            if twice := [name for name in header if header.count(name) > 1]:
                raise ValueError(f"{file} has two columns {twice[0]!r}")
        elif values and len(values) != len(header):
            yield Row(source, {}, f"{len(values)} values for {len(header)} columns")
        elif values:
            yield Row(source, dict(zip(header, values, strict=True)))


def _read_comma_separated(file: Path) -> Iterator[Row]:
    return _read_table(file, ",")


def _read_tab_separated(file: Path) -> Iterator[Row]:
    return _read_table(file, "\t")


def _read_parquet(file: Path) -> Iterator[Row]:
    from pyarrow import ArrowException  # type: ignore[import-untyped]
    from pyarrow.parquet import ParquetFile  # type: ignore[import-untyped]

    number = 0
    try:
        with ParquetFile(file) as table:
            for batch in table.iter_batches():
                for values in batch.to_pylist():
                    number += 1
                    yield Row(f"{file.name}:{number}", values)
    except ArrowException as error:
        raise ValueError(f"{file} is no valid parquet file: {error}") from error


def _read_hub(place: str, split: str) -> Iterator[Row]:
    from datasets import load_dataset

    address, _, asked = place.removeprefix(HUB).partition("@")
    name, _, config = address.partition(":")
    asked = asked or HUB_SPLITS[split]
    try:
        rows = load_dataset(name, config or None, split=asked)
    except Exception as error:  # the hub's, the network's and the file formats' own kinds
        reason = " ".join(str(error).split())[:300]
        raise UnreachableError(f"cannot load {place} (split {asked}): {type(error).__name__}: {reason}") from error
    for number, values in enumerate(rows, 1):
        yield Row(f"{HUB}{address}@{asked}:{number}", dict(values))


def _text(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error.reason} at byte {error.start}; save it as UTF-8") from error


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_comma_separated,
    ".tsv": _read_tab_separated,
    ".parquet": _read_parquet,
}
