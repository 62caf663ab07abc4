"""Every benchmark runs, on a tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from benchmarks.aims import aims
from benchmarks.compare import answer
from benchmarks.memory import cases
from benchmarks.models import SIZES, write
from benchmarks.processes import launch
from benchmarks.settings import Settings
from benchmarks.table import render

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_each_prints_its_lines() -> None:
    command = [sys.executable, "-m", "benchmarks", "all", "--quick"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=270, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    kinds = {(line["benchmark"], line["kind"]) for line in lines}
    compared = {(work, kind) for work in ("step", "rollout", "train") for kind in ("seconds", "memory", "ratio")}
    assert kinds == compared | {
        ("step", "floor"), ("train", "floor"), ("floors", "ceiling"), ("floors", "work"), ("head", "head"),
        ("scaling", "length"), ("scaling", "rows"), ("scaling", "rho"), ("cluster", "predicted"),
        ("memory", "estimate"),
    }  # fmt: skip
    for line in lines:
        assert {"device", "processor", "cores", "torch", "trl", "command"} <= set(line)
    measured = [line["median"] for line in lines if line["kind"] == "seconds"]
    assert len(measured) == 10
    assert min(measured) > 0
    sampled = {(line["benchmark"], line["side"]): line for line in lines if line.get("tokens_per_second")}
    assert set(sampled) == {(work, who) for work in ("step", "rollout") for who in ("lit-rlvr", "TRL")}
    assert render(lines).count("\n**") == len(kinds) + 1  # and predictions; aims come first
    as_s = [{**line, "size": "S"} for line in lines]
    found = {aim.what: aim.find(as_s) for aim in aims()}
    first = found["step on S, TRL / lit-rlvr"]
    assert first is not None
    assert first.possible is not None
    for what in ("peak memory of a step on S, lit-rlvr / TRL", "explain's estimate of memory, worst deviation (%)"):
        assert found[what] is not None


@pytest.mark.long
@pytest.mark.timeout(280)
def test_memory_is_estimated_within_a_quarter_on_s(tmp_path: Path) -> None:
    """What explain says, against the largest sum of what torch held in two steps of the real loop."""
    size = SIZES["S"]
    training = [case for case in cases(Settings(str(write(size, tmp_path)), size)) if case.work == "train"]
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda case: answer("memory_side", case.written()), training))
    ratios = [both["estimated"] / both["measured"] for both in results]
    assert len({(case.rho, case.module["gradient_checkpointing"]) for case in training}) == len(ratios) == 4
    assert all(0.75 <= ratio <= 1.25 for ratio in ratios), ratios


def test_a_program_that_fails_says_why() -> None:
    """Its last words reach the caller, whether it is a new process or a copy of this one."""
    with pytest.raises(RuntimeError, match=r"ceilings failed:(.|\n)*JSONDecodeError"):
        answer("ceilings", "no JSON", "cpu")
    launch.forks = True
    try:
        with pytest.raises(RuntimeError, match=r"ceilings failed:(.|\n)*JSONDecodeError"):
            answer("ceilings", "no JSON", "cpu")
    finally:
        launch.forks = False
