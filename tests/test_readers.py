"""Readers: every kind of file gives the same rows, and broken rows are named by file and line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet  # type: ignore[import-untyped]
import pytest

from lit_rlvr.tasks.readers import Row, read_rows

TEXTS = [{"question": "1+1?", "answer": "2"}, {"question": 'say "é",\nplease', "answer": "é\t|"}]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    """Write rows as the path's suffix says."""
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return str(path)
    if path.suffix == ".json":
        text = json.dumps(rows, indent=1)
    elif path.suffix in (".csv", ".tsv"):
        mark = {".csv": ",", ".tsv": "\t"}[path.suffix]
        quoted = [['"' + value.replace('"', '""') + '"' for value in row.values()] for row in rows]
        text = "".join(mark.join(line) + "\r\n" for line in [list(rows[0]), *quoted])
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(text.encode())
    return str(path)


def read(place: Any, text: str | None = None, split: str = "train") -> list[Row]:
    """All rows of a place, which may be written first."""
    if text is not None:
        place.write_bytes(text.encode())
    return list(read_rows(str(place), split))


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("a.jsonl", [1, 2]),
        ("a.NDJSON", [1, 2]),
        ("a.json", [2, 6]),
        ("a.csv", [2, 3]),
        ("a.tsv", [2, 3]),
        ("a.parquet", [1, 2]),
    ],
)
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str, lines: list[int]) -> None:
    """With their lines; a parquet file has rows instead."""
    place = write(tmp_path / name, TEXTS)
    assert read(place) == [Row(f"{name}:{line}", row) for line, row in zip(lines, TEXTS, strict=True)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_byte_order_marks_are_ignored(tmp_path: Path, name: str) -> None:
    """Spreadsheets write them."""
    place = Path(write(tmp_path / name, TEXTS))
    place.write_bytes(b"\xef\xbb\xbf" + place.read_bytes())
    assert [row.values for row in read(place)] == TEXTS


def test_json_lines_that_are_broken(tmp_path: Path) -> None:
    """Blank lines count as lines, and are no rows."""
    place = tmp_path / "a.jsonl"
    place.write_bytes(b'{"a": 1}\n\n{"a": 2\n[3]\n"x"\n\xff\n' + b"[" * 100_000 + b'\n{"a": 7}')
    rows = read(place)
    assert [row.source for row in rows] == [f"a.jsonl:{line}" for line in (1, 3, 4, 5, 6, 7, 8)]
    assert [row.values for row in rows] == [{"a": 1}, {}, {}, {}, {}, {}, {"a": 7}]
    broken = {row.source: row.problem for row in rows if row.problem is not None}
    expected = {
        "a.jsonl:3": "no valid JSON: Expecting ',' delimiter (character 8)",
        "a.jsonl:4": "expected an object with columns, got [3]",
        "a.jsonl:5": 'expected an object with columns, got "x"',
        "a.jsonl:6": "no valid JSON: 'utf-8' codec can't decode byte 0xff",
        "a.jsonl:7": "no valid JSON: maximum recursion depth exceeded",
    }
    assert {source: broken[source][: len(start)] for source, start in expected.items()} == expected
    assert broken.keys() == expected.keys()


def test_a_list_of_objects(tmp_path: Path) -> None:
    """On one line or many; what is no object is named by its line."""
    rows = read(tmp_path / "a.json", '\n [{"a": "[1,\\n2]"},\n\n\n7 , {"a":\n2}]\n')
    assert rows[0] == Row("a.json:2", {"a": "[1,\n2]"})
    assert rows[1] == Row("a.json:5", {}, "expected an object with columns, got 7")
    assert rows[2] == Row("a.json:5", {"a": 2})
    assert read(tmp_path / "b.json", " [ ] ") == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1}', "must hold a list of objects"),
        ("", "must hold a list of objects"),
        ('[{"a": 1},\n{"a": }]', "a.json:2 is no valid JSON: Expecting value"),
        ('[{"a": 1},\n]', "a.json:2 is no valid JSON"),
        ('[{"a": 1}\n{"a": 2}]', "a.json:2 is no valid JSON: expected a comma or ] after a row"),
        ('[{"a": 1}', "a.json:1 is no valid JSON: expected a comma or ] after a row"),
    ],
)
def test_lists_that_cannot_be_read(tmp_path: Path, text: str, message: str) -> None:
    """Nothing after a mistake can be trusted, so the whole file is refused."""
    with pytest.raises(ValueError, match=re.escape(message)):
        read(tmp_path / "a.json", text)


def test_tables(tmp_path: Path) -> None:
    """Quoted values may go over lines; a row with another number of values is named, a blank line is not."""
    text = 'a,b\n1,"x\ny"\n\n2\n3,4,5\n"6,7\n'
    rows = read(tmp_path / "a.csv", text)
    assert rows[:3] == [
        Row("a.csv:2", {"a": "1", "b": "x\ny"}),
        Row("a.csv:5", {}, "1 values for 2 columns"),
        Row("a.csv:6", {}, "3 values for 2 columns"),
    ]
    assert (rows[3].source, rows[3].problem) == ("a.csv:7", "no valid table row: unexpected end of data")
    assert len(rows) == 4
    assert read(tmp_path / "b.tsv", "a\tb\n1,5\t2\n") == [Row("b.tsv:2", {"a": "1,5", "b": "2"})]
    assert read(tmp_path / "c.csv", "") == []
    with pytest.raises(ValueError, match=r"d\.csv has two columns 'a'"):
        read(tmp_path / "d.csv", "a,b,a\n1,2,3\n")
    (tmp_path / "e.csv").write_bytes(b"a\n\xe9\n")
    with pytest.raises(ValueError, match=r"e\.csv is not UTF-8 text: .* at byte 2; save it as UTF-8"):
        read(tmp_path / "e.csv")


def test_parquet_keeps_types(tmp_path: Path) -> None:
    """Numbers, lists and nulls arrive as such; another file with that suffix is refused."""
    rows: list[dict[str, Any]] = [{"a": 1, "b": [1.5, 2.0]}, {"a": None, "b": None}]
    assert [row.values for row in read(write(tmp_path / "a.parquet", rows))] == rows
    with pytest.raises(ValueError, match=r"b\.parquet is no valid parquet file"):
        read(tmp_path / "b.parquet", "question,answer\n")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("problem.jsonl", "there is no file problem.jsonl in {folder}; did you mean problems.jsonl?"),
        ("x.csv", "there is no file x.csv in {folder}; there are problems.jsonl"),
        ("no/problems.jsonl", "there is no file no/problems.jsonl: the folder {folder}/no does not exist"),
        ("folder.csv", "there is no file folder.csv in {folder}"),
        ("problems.jsonlines", "unknown suffix '.jsonlines'; did you mean .jsonl"),
        ("problems.txt", "unknown suffix '.txt'; known are .jsonl, .ndjson, .json, .csv, .tsv, .parquet, and hf:NAME"),
        ("problems", "unknown suffix ''; known are"),
    ],
)
def test_files_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    """With what is near, or what is there."""
    write(tmp_path / "problems.jsonl", TEXTS)
    (tmp_path / "folder.csv").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=re.escape(message.replace("{folder}", str(tmp_path)))):
        read(name)


@pytest.mark.parametrize(
    ("place", "split", "asked", "source"),
    [
        ("hf:openai/gsm8k:main", "train", ("openai/gsm8k", "main", "train"), "hf:openai/gsm8k:main@train:1"),
        ("hf:openai/gsm8k:main", "val", ("openai/gsm8k", "main", "validation"), "hf:openai/gsm8k:main@validation:1"),
        ("hf:a/b@train[:5%]", "test", ("a/b", None, "train[:5%]"), "hf:a/b@train[:5%]:1"),
        ("hf:b", "test", ("b", None, "test"), "hf:b@test:1"),
    ],
)
def test_names_of_datasets(
    monkeypatch: pytest.MonkeyPatch, place: str, split: str, asked: tuple[str, str | None, str], source: str
) -> None:
    """Name, configuration and split, which is the one that it is read for unless it is given."""
    calls = []

    def load_dataset(name: str, config: str | None, split: str) -> list[dict[str, str]]:
        calls.append((name, config, split))
        return TEXTS

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    rows = read(place, split=split)
    assert calls == [asked]
    assert rows[0] == Row(source, TEXTS[0])
    assert rows[1].source == source[:-1] + "2"


def test_a_dataset_in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the datasets package itself; what it refuses is a sentence."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    write(tmp_path / "data/train.jsonl", TEXTS)
    assert [row.values for row in read(f"hf:{tmp_path}/data")] == TEXTS
    with pytest.raises(ValueError, match=r"cannot load hf:.*/data \(split validation\): .*validation"):
        read(f"hf:{tmp_path}/data", split="val")
