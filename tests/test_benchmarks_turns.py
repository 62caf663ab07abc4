"""How sides take turns, with small programs in the place of frameworks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import compare, processes
from benchmarks.compare import Side, interleave
from benchmarks.settings import HeadSettings

PROGRAM = """
import json, sys

name, log = sys.argv[1:]

def tell(word, **values):
    with open(log, "a") as file:
        file.write(f"{name}{word} ")
    print(json.dumps(values), flush=True)

tell("(", ready=True)
number = 0
while sys.stdin.readline() == "go\\n":
    number += 1
    if name == "c" and number == 2:
        sys.exit("out of memory")
    tell(str(number), step=float(number))
tell(")", peak=100.0 + number, loaded=50.0)
"""


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where programs write what they do; each is called like its side."""
    file = tmp_path / "log"

    def launch(program: str, *arguments: str, environment: Any = None) -> Any:
        pipe = subprocess.PIPE
        command = [sys.executable, "-S", "-c", PROGRAM, program, str(file)]
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)

    monkeypatch.setattr(compare, "launch", launch)
    return file


def named(names: str, device: str) -> list[Side]:
    """Sides that measure nothing."""
    return [Side(name, name, HeadSettings("full", 8, 2, 4, device=device)) for name in names]


def test_a_gpu_holds_one_side_at_a_time(log: Path) -> None:
    """Each comes twice, the second time in the other order; its warm step does not count."""
    first, second = named("ab", "cuda")
    interleave([first, second], repeats=3)
    assert log.read_text().split() == [
        "a(", "a1", "a2", "a3", "a)", "b(", "b1", "b2", "b3", "b)",
        "b(", "b1", "b2", "b)", "a(", "a1", "a2", "a)",
    ]  # fmt: skip
    for side in (first, second):
        assert [sample["step"] for sample in side.samples] == [2.0, 3.0, 2.0]
        assert side.memory == {"peak": 103.0, "loaded": 50.0}  # of the longer visit
        assert side.process.poll() == 0


def test_a_side_can_come_to_a_gpu_once(log: Path) -> None:
    interleave(named("ab", "cuda"), repeats=2, visits=1)
    assert log.read_text().split() == ["a(", "a1", "a2", "a3", "a)", "b(", "b1", "b2", "b3", "b)"]


def test_sides_take_turns_step_by_step_on_a_cpu(log: Path) -> None:
    """The order is turned round every time; both have loaded before either works."""
    sides = named("ab", "cpu")
    interleave(sides, repeats=2)
    words = log.read_text().split()
    assert sorted(words[:2]) == ["a(", "b("]
    assert words[2:8] == ["b1", "a1", "a2", "b2", "b3", "a3"]
    assert sorted(words[8:]) == ["a)", "b)"]
    assert [[sample["step"] for sample in side.samples] for side in sides] == [[2.0, 3.0]] * 2


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_nothing_is_left_behind_when_a_side_fails(log: Path, device: str) -> None:
    sides = named("ac", device)
    with pytest.raises(RuntimeError, match=r"c ended early:\n(.|\n)*out of memory"):
        interleave(sides, repeats=2)
    assert all(side.process.poll() is not None for side in sides)


def test_programs_see_one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL would refuse several in one process."""
    for visible, first in (("3,4", "3"), ("", ""), ("GPU-12", "GPU-12")):
        monkeypatch.setenv(processes.CARDS, visible)
        assert processes.first_card() == first
    monkeypatch.delenv(processes.CARDS)
    assert processes.first_card() == "0"
