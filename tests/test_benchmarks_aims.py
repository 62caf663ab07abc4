"""Aims beside results."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.aims import Aim, Found, aims, over_trl, ratio, worst_estimate
from benchmarks.table import aimed

STEP = {"benchmark": "step", "size": "S", "part": "step", "ends": 0}
RATIO: dict[str, Any] = {**STEP, "kind": "ratio", "side": "TRL", "median": 2.6, "low": 2.4, "high": 2.7}
FLOOR: dict[str, Any] = {**STEP, "kind": "floor", "side": "TRL", "counted": "least", "times": 3.5}


def test_a_ratio_comes_with_its_spread_and_the_most_that_is_possible() -> None:
    find = ratio("step", "step", "S", "TRL")
    assert find([RATIO, {**FLOOR, "counted": "all tokens", "times": 9.0}, FLOOR]) == Found(2.6, 2.4, 2.7, 3.5)
    assert find([RATIO]) == Found(2.6, 2.4, 2.7, None)
    for other in ({"size": "M"}, {"side": "TRL tuned"}, {"ends": 8}, {"part": "train"}):
        assert find([{**RATIO, **other}]) is None


@pytest.mark.parametrize(
    ("found", "at_least", "words"),
    [
        (None, True, "not measured"),
        (Found(2.5), True, "met"),
        (Found(2.4), True, "missed"),
        (Found(2.5), False, "met"),
        (Found(2.6), False, "missed"),
        (Found(2.6, 2.4, 2.7), True, "met, within the spread"),
        (Found(2.4, 2.3, 2.6), True, "missed, within the spread"),
        (Found(2.7, 2.6, 2.8), True, "met"),
    ],
)
def test_verdicts(found: Found | None, at_least: bool, words: str) -> None:
    assert Aim("this", 2.5, lambda results: found, at_least).verdict(found) == words


def test_what_is_only_reported() -> None:
    aim = Aim("that", None, lambda results: None)
    assert (aim.verdict(Found(1.0)), aim.verdict(None)) == ("reported", "not measured")


def test_memory_against_trl_and_against_the_estimate() -> None:
    held = {**STEP, "kind": "memory"}
    del held["part"]
    ours, theirs = {**held, "side": "lit-rlvr", "peak": 90.0}, {**held, "side": "TRL", "peak": 120.0}
    assert over_trl("peak", "S")([ours, theirs]) == Found(0.75)
    assert over_trl("extra", "S")([{**ours, "extra": 30.0}, {**theirs, "extra": 20.0}]) == Found(1.5)
    assert over_trl("peak", "S")([ours]) is None
    estimates = [
        {"kind": "estimate", "size": size, "ratio": found} for size, found in (("S", 1.1), ("M", 0.8), ("tiny", 2.0))
    ]
    worst = worst_estimate(estimates)
    assert worst is not None
    assert worst.value == pytest.approx(20)
    assert worst_estimate([held]) is None


def test_the_table_names_every_aim() -> None:
    rows = aimed([RATIO, FLOOR]).splitlines()
    assert len(rows) == 4 + len(list(aims()))
    assert "| step on S, TRL / lit-rlvr | ≥ 2.5 | 2.6 | 2.4 to 2.7 | 3.5 | met, within the spread |" in rows
    assert "| step on M, TRL / lit-rlvr | ≥ 4.5 |  |  |  | not measured |" in rows
    assert "| step on M, lit-rlvr / the least | ≤ 1.6 |  |  |  | not measured |" in rows
    assert "| step on 0.6B, on a GPU, TRL / lit-rlvr |  |  |  |  | not measured |" in rows
