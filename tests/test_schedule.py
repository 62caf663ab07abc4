"""Schedules: hand-computed values, what they refuse, and how YAML writes them."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from lit_rlvr_callbacks import EntropyTopK, StageDetector

from lit_rlvr.cli_errors import clear
from lit_rlvr.credit import CreditContext, credit_chain
from lit_rlvr.schedule import Schedule, at, ends


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (Schedule(start=1.0, end=0.2, phases=4), {0: 1.0, 1: 0.8, 2: 0.6, 3: 0.4, 4: 0.2, 5: 0.2, 10**9: 0.2}),
        (Schedule(start=0.0, end=2.0, phases=2, begin=3), {0: 0.0, 3: 0.0, 4: 1.0, 5: 2.0, 6: 2.0}),
        (
            Schedule("cosine", start=1.0, end=0.0, phases=4),
            {0: 1.0, 1: (1 + math.sqrt(0.5)) / 2, 2: 0.5, 3: (1 - math.sqrt(0.5)) / 2, 4: 0.0, 9: 0.0},
        ),
        (Schedule(start=3.0, end=0.1, phases=1), {0: 3.0, 1: 0.1}),
        (0.3, {0: 0.3, 7: 0.3}),
    ],
)
def test_by_hand(schedule: Schedule | float, values: dict[int, float]) -> None:
    """Start up to ``begin``, end from ``begin + phases`` on."""
    for step, value in values.items():
        assert at(schedule, CreditContext(step=step)) == pytest.approx(value)


def test_by_stage() -> None:
    """Whatever the step."""
    schedule = Schedule(rising=1.0, plateau=0.2)
    assert [at(schedule, CreditContext(step=9, stage=stage)) for stage in ("rising", "plateau")] == [1.0, 0.2]
    with pytest.raises(ValueError, match="needs a stage detector in the list"):
        at(schedule, CreditContext())


NUMBERS = st.floats(-10, 10)


@given(st.sampled_from(["linear", "cosine"]), NUMBERS, NUMBERS, st.integers(1, 50), st.integers(0, 20))
def test_it_ends_exactly_and_stays_between_its_ends(
    kind: Any, start: float, end: float, phases: int, begin: int
) -> None:
    """Monotonic, so a range that holds at both ends holds in every phase."""
    schedule = Schedule(kind, start, end, phases, begin)
    values = [schedule.at(step) for step in range(begin + phases + 3)]
    assert (values[begin], values[-1]) == (start, end)
    assert ends(schedule) == (start, end)
    steps = [b - a for a, b in pairwise(values)]
    rounding = 1e-14 * (abs(start) + abs(end))
    assert all(step * math.copysign(1, end - start) >= -rounding for step in steps)


FORMS = "a schedule needs start, end and phases"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, FORMS),
        ({"start": 1.0, "end": 0.0}, FORMS),
        ({"rising": 1.0}, FORMS),
        ({"rising": 1.0, "plateau": 0.5, "phases": 3}, FORMS),
        ({"rising": 1.0, "plateau": 0.5, "begin": 3}, FORMS),
        ({"kind": "cosine", "rising": 1.0, "plateau": 0.5}, FORMS),
        ({"kind": "step", "start": 1.0, "end": 0.0, "phases": 3}, "kind must be linear or cosine, got 'step'"),
        ({"start": 1.0, "end": math.inf, "phases": 3}, "needs finite numbers, got 1.0 and inf"),
        ({"rising": math.nan, "plateau": 0.0}, "needs finite numbers, got nan and 0.0"),
        ({"start": 1.0, "end": 0.0, "phases": 0}, "phases of at least 1 and begin of at least 0, got 0 and 0"),
        ({"start": 1.0, "end": 0.0, "phases": 1, "begin": -1}, "begin of at least 0, got 1 and -1"),
    ],
)
def test_what_makes_no_schedule_is_refused(options: dict[str, Any], message: str) -> None:
    """Nothing that was given is ignored."""
    with pytest.raises(ValueError, match=message):
        Schedule(**options)


def test_a_schedule_by_stage_needs_a_detector() -> None:
    """Refused before anything runs, like ``stages``."""
    callback = EntropyTopK(rho=Schedule(rising=1.0, plateau=0.2))
    with pytest.raises(ValueError, match=r"EntropyTopK\.rho goes by stage, but no stage detector is in the list"):
        credit_chain([callback])
    assert len(credit_chain([callback, StageDetector()])) == 2


@pytest.fixture(scope="module")
def parser() -> ArgumentParser:
    """A parser with one callback, as the command line builds it."""
    made = ArgumentParser(exit_on_error=False, parser_mode="omegaconf+")
    made.add_subclass_arguments(EntropyTopK, "callback")
    return made


@pytest.mark.parametrize(
    ("rho", "wanted"),
    [
        ("0.2", 0.2),
        ("{kind: cosine, start: 1, end: 0.2, phases: 9}", Schedule("cosine", 1.0, 0.2, 9)),
        ("{start: 1, end: 0.2, phases: 9, begin: 2}", Schedule("linear", 1.0, 0.2, 9, 2)),
        ("{rising: 1, plateau: 0.5}", Schedule(rising=1.0, plateau=0.5)),
    ],
)
def test_in_yaml(parser: ArgumentParser, rho: str, wanted: Schedule | float) -> None:
    """A number or a mapping; written out and read again it is the same."""
    parsed = parser.parse_args(["--callback=EntropyTopK", f"--callback.rho={rho}"])
    assert parser.instantiate(parsed).callback.rho == wanted
    again = parser.parse_string(parser.dump(parsed))
    assert parser.instantiate(again).callback.rho == wanted


@pytest.mark.parametrize(
    ("rho", "message"),
    [
        ("often", "callback.rho must be a number or a schedule, got 'often'"),
        ("{kind: cosinus, start: 1, end: 0.2, phases: 9}", "callback.rho.kind must be one of linear, cosine, got"),
        ("{start: 1, end: 0.2, phase: 9}", "Schedule has no option 'phase'; did you mean phases?"),
    ],
)
def test_errors_in_yaml(parser: ArgumentParser, rho: str, message: str) -> None:
    """A sentence about the option."""
    with pytest.raises(Exception, match="callback") as caught:
        parser.parse_args(["--callback=EntropyTopK", f"--callback.rho={rho}"])
    assert message in clear(str(caught.value), ["callback"], {"callback": ["EntropyTopK"]})
