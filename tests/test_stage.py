"""StageDetector: when the plateau begins, that it does not end, and that a resumed run agrees."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lit_rlvr_callbacks import StageDetector
from rollouts import build_rollout, full_credit, run_chain

from lit_rlvr.credit import CreditContext

DECAY_THEN_FLAT = [0.05 + 0.95 * math.exp(-t / 10) for t in range(30)] + [0.1] * 40
"""In the first part the entropy falls by more than a tenth over any 5 phases."""


def watch(detector: StageDetector, entropies: Sequence[float], start: int = 0) -> list[dict[str, float]]:
    """Show it one phase after another, each with this mean entropy; what it logged, and the stage as a number."""
    logged = []
    for step, entropy in enumerate(entropies, start):
        # Two responses of unequal length: the mean is over tokens, not over responses.
        rollout = build_rollout([[entropy * 0.5, entropy * 1.5, entropy], [entropy]])
        ctx = CreditContext(step=step)
        credit = full_credit(rollout)
        assert run_chain([detector], rollout, credit, ctx) is credit
        plateau = float(ctx.stage == "plateau")
        assert detector.stage() == ctx.stage == ("plateau" if plateau else "rising")
        logged.append({k.removeprefix("credit/StageDetector/"): v for k, v in ctx.metrics.items()} | {"is": plateau})
    return logged


def begins(logged: Sequence[dict[str, float]]) -> int | None:
    """The first phase in the plateau, counted from 0."""
    return next((step for step, numbers in enumerate(logged) if numbers["is"]), None)


def reference(entropies: Sequence[float], window: int, drop: float, patience: int, smoothing: float) -> int | None:
    """The rule as its docstring has it, on the whole curve at once; the average in closed form."""
    curve = np.array(entropies)
    smoothed = []
    for t in range(len(curve)):
        weights = smoothing * (1 - smoothing) ** np.arange(t, -1, -1.0)
        weights[0] = (1 - smoothing) ** t
        smoothed.append(float(weights @ curve[: t + 1]))
    flat = [t >= window and 1 - smoothed[t] / smoothed[t - window] < drop for t in range(len(curve))]
    runs = [t for t in range(patience - 1, len(flat)) if all(flat[t - patience + 1 : t + 1])]
    return runs[0] if runs else None


@pytest.mark.parametrize(
    ("entropies", "wanted"),
    [
        ([1.0, 0.5, 0.46, 0.45, 0.44], 3),  # drops .5, .08, .02: the second below .1 is at 3
        ([1.0, 0.98, 0.5, 0.49, 0.48], 4),  # a drop of .49 at 2 starts the count again
        ([1.0, 0.8, 0.6, 0.4, 0.2], None),
        ([1.0, 1.5, 2.0], 2),  # rising entropy does not drop
        ([1.0, 1.0], None),  # only one comparison yet
    ],
)
def test_by_hand_without_smoothing(entropies: list[float], wanted: int | None) -> None:
    """Window 1, two phases in a row below a tenth."""
    detector = StageDetector(window=1, patience=2, smoothing=1.0)
    assert begins(watch(detector, entropies)) == wanted
    assert detector.plateau_step == wanted


def test_smoothing_by_hand() -> None:
    """The average of 1, .5, .5 at .5 is 1, .75, .625; over 2 phases it drops by .375."""
    logged = watch(StageDetector(window=2, smoothing=0.5), [1.0, 0.5, 0.5])
    assert [numbers["smoothed_entropy"] for numbers in logged] == pytest.approx([1.0, 0.75, 0.625])
    assert ["relative_drop" in numbers for numbers in logged] == [False, False, True]
    assert logged[2]["relative_drop"] == pytest.approx(0.375)


def test_decay_then_flat() -> None:
    """Never while the entropy decays; soon after it stops, by what the average and the window need to notice."""
    logged = watch(StageDetector(), DECAY_THEN_FLAT)
    begin = begins(logged)
    assert begin is not None
    assert 30 < begin <= 30 + 5 + 3 + 6  # window, patience, and a slow average


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    st.lists(st.floats(0.25, 1.0), min_size=1, max_size=14),
    st.integers(1, 4),
    st.floats(0, 0.9),
    st.integers(1, 4),
    st.floats(0.05, 1.0),
)
def test_against_the_rule_on_the_whole_curve(
    entropies: list[float], window: int, drop: float, patience: int, smoothing: float
) -> None:
    """Phase by phase with a short memory, or all at once in NumPy."""
    entropies = torch.tensor(entropies).tolist()  # what float32 keeps of them
    # A drop a hair from the limit may fall on either side.
    wanted = [reference(entropies, window, drop + hair, patience, smoothing) for hair in (-1e-6, 1e-6)]
    detector = StageDetector(window, drop, patience, smoothing)
    begin = begins(watch(detector, entropies))
    if wanted[0] == wanted[1]:
        assert begin == wanted[0]


def test_the_plateau_does_not_end() -> None:
    """A later fall of the entropy changes neither the stage nor the step that was found."""
    detector = StageDetector(window=1, patience=1, smoothing=1.0)
    logged = watch(detector, [1.0, 1.0, 0.1, 0.01, 0.001])
    assert [numbers["is"] for numbers in logged] == [0, 1, 1, 1, 1]
    assert [numbers["plateau_step"] for numbers in logged] == [-1, 1, 1, 1, 1]


def test_a_fixed_step_needs_no_entropy() -> None:
    """Flat before it or falling after it, the plateau begins at that phase."""
    for entropies in ([1.0] * 6, [2.0**-t for t in range(6)]):
        detector = StageDetector(window=1, patience=1, smoothing=1.0, at_step=4)
        assert begins(watch(detector, entropies)) == 4
        assert detector.plateau_step == 4


def test_a_fixed_step_that_is_past() -> None:
    """A run that is resumed after it is in the plateau at once, and logs when it saw it."""
    logged = watch(StageDetector(at_step=4), [1.0, 1.0], start=10)
    assert [numbers["is"] for numbers in logged] == [1, 1]
    assert [numbers["plateau_step"] for numbers in logged] == [10, 10]


@pytest.mark.parametrize("cut", range(1, len(DECAY_THEN_FLAT), 7))
def test_resuming_anywhere_changes_nothing(cut: int) -> None:
    """The state is plain; the resumed detector logs the same numbers to the last bit."""
    straight = watch(StageDetector(), DECAY_THEN_FLAT)
    stopped = StageDetector()
    before = watch(stopped, DECAY_THEN_FLAT[:cut])
    file = io.BytesIO()
    torch.save(stopped.state_dict(), file)
    file.seek(0)
    resumed = StageDetector()
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert before + watch(resumed, DECAY_THEN_FLAT[cut:], start=cut) == straight


def test_saved_state_does_not_change_afterwards() -> None:
    """A checkpoint is a copy, not a view of the running detector."""
    detector = StageDetector()
    watch(detector, [1.0, 0.9])
    state = detector.state_dict()
    saved = [list(value) if isinstance(value, list) else value for value in state.values()]
    other = StageDetector()
    other.load_state_dict(state)
    for one in (detector, other):
        watch(one, [0.5] * 9, start=2)
    assert list(state.values()) == saved


def test_a_phase_without_rows_says_nothing() -> None:
    """Dynamic sampling may leave no group; the average stays where it was."""
    detector = StageDetector()
    watch(detector, [1.0, 1.0])
    nothing = build_rollout([[1.0]]).rows(torch.zeros(0, dtype=torch.int64))
    detector.observe(nothing, CreditContext(step=2))
    assert watch(detector, [1.0], start=3)[0]["smoothed_entropy"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window and patience must be at least 1, got 0 and 3"),
        ({"patience": 0}, "window and patience must be at least 1, got 5 and 0"),
        ({"smoothing": 0.0}, r"smoothing in \(0, 1\] and drop in \[0, 1\), got 0.0 and 0.1"),
        ({"smoothing": 1.1}, r"smoothing in \(0, 1\]"),
        ({"drop": 1.0}, r"drop in \[0, 1\), got 0.3 and 1.0"),
        ({"drop": -0.1}, r"drop in \[0, 1\)"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    """The message says the range."""
    with pytest.raises(ValueError, match=message):
        StageDetector(**options)
