"""PositionShaping against hand-computed values and the published formula in NumPy."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from lit_rlvr_callbacks import PositionShaping, StageDetector
from rollouts import build_rollout, full_credit, phases, run_chain
from torch import Tensor
from torch.testing import assert_close

from lit_rlvr.credit import CreditCallback, CreditContext
from lit_rlvr.schedule import Schedule
from lit_rlvr.types import Credit, RolloutBatch

near = partial(assert_close, check_dtype=False)
"""Closeness in float32, of float32 results to values in float64."""
CONFIG = Path(__file__).parents[1] / "configs/callbacks/position.yaml"
FOUR = build_rollout([[0.5] * 4])


def shaped(advantage: float, rollout: RolloutBatch = FOUR, step: int = 0, **options: Any) -> Tensor:
    """What an advantage becomes along a response."""
    ctx = CreditContext(step=step)
    credit = full_credit(rollout, [advantage] * len(rollout))
    return run_chain([PositionShaping(**options)], rollout, credit, ctx).advantage


def sigmoid(x: float) -> float:
    """1 / (1 + e^-x)."""
    return 1 / (1 + math.exp(-x))


BONUS = torch.tensor([[sigmoid(-7.5), sigmoid(-3.75), 0.5, sigmoid(3.75)]]).double() * 0.1
"""The paper's gamma .1 and k 15 at r = 0, 1/4, 2/4, 3/4."""


def test_four_tokens_by_hand() -> None:
    """The bonus carries the sign of the advantage; r runs over 0, .25, .5, .75."""
    near(shaped(1.0), 1 + BONUS)
    near(shaped(-1.0), -1 - BONUS)
    near(shaped(2.0, gamma=0.3), 2 + 3 * BONUS)
    near(shaped(1.0)[0, 2], torch.tensor(1.05).double())


def test_slope_and_centre() -> None:
    """A flat slope gives half of gamma everywhere; the centre moves where half is reached."""
    near(shaped(1.0, slope=0.0), torch.full((1, 4), 1.05).double())
    near(shaped(1.0, centre=0.75)[0, 3], torch.tensor(1.05).double())


def test_the_cap_is_a_share_of_the_advantage() -> None:
    """At |A| = .1 the bonus stops at .05; at another cap elsewhere."""
    near(shaped(0.1), 0.1 + BONUS.clamp(max=0.05))
    assert float(shaped(0.1)[0, 3]) == pytest.approx(0.15)
    assert float(shaped(-0.1, cap=0.2)[0, 3]) == pytest.approx(-0.12)


def test_zero_stays_zero() -> None:
    """Nothing to enlarge, and no sign."""
    assert shaped(0.0).tolist() == [[0.0] * 4]


def test_each_response_has_its_own_length() -> None:
    """The second of two tokens stands at r = 1/2, like the third of four; padding gets nothing, whatever it holds."""
    rollout = build_rollout([[0.5] * 4, [0.5] * 2])
    credit = replace(full_credit(rollout), advantage=torch.ones(2, 4))
    after = run_chain([PositionShaping()], rollout, credit, CreditContext()).advantage
    near(after[0], 1 + BONUS[0])
    near(after[1], torch.tensor([1 + float(BONUS[0, 0]), 1.05, 1.0, 1.0]).double())


@pytest.mark.parametrize(("step", "acts"), [(0, False), (199, False), (200, True), (298, True), (299, False)])
def test_the_papers_window(step: int, acts: bool) -> None:
    """200 < step < 300, counted from 1; outside of it the credit is returned as it is and nothing is logged."""
    ctx, credit = CreditContext(step=step), full_credit(FOUR)
    options = yaml.safe_load(CONFIG.read_text())["trainer"]["callbacks+"][0]["init_args"]
    after = run_chain([PositionShaping(**options)], FOUR, credit, ctx)
    assert (after is not credit) == acts
    near(after.advantage, 1 + BONUS * acts)
    names = ["bonus", "factor_min", "factor_max"] if acts else []
    assert list(ctx.metrics) == [f"credit/PositionShaping/{name}" for name in names]


def test_without_a_window_it_always_acts() -> None:
    """From the first phase on, without an end."""
    for step in (0, 10_000):
        near(shaped(1.0, step=step), 1 + BONUS)
    near(shaped(1.0, step=10_000, first_step=3), 1 + BONUS)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(phases(), st.floats(0, 2), st.floats(-30, 30), st.floats(0, 1), st.floats(0, 1))
def test_against_numpy(
    phase: tuple[RolloutBatch, Credit], gamma: float, slope: float, centre: float, cap: float
) -> None:
    """A + sign(A) min(gamma sigmoid(k (r - c)), cap |A|), r = (t - 1) / L with t from 1, in float64."""
    rollout, credit = phase
    wanted = credit.advantage.double().numpy().copy()
    for i, length in enumerate(rollout.lengths.tolist()):
        for t in range(1, length + 1):
            a = wanted[i, t - 1]
            bonus = gamma / (1 + np.exp(-slope * ((t - 1) / length - centre)))
            wanted[i, t - 1] = a + np.sign(a) * min(bonus, cap * abs(a))
    callback = PositionShaping(gamma, slope, centre, cap)
    after = run_chain([callback], rollout, credit, CreditContext())
    # float32 steps of 6e-8 in r and 2 e-6 in k (r - c), so a bonus is off by up to 4e-6 of itself.
    assert_close(after.advantage.double().numpy(), wanted, rtol=1e-5, atol=1e-6)
    assert after.weight is credit.weight
    assert after.count is credit.count


def test_metrics_by_hand() -> None:
    """Bonuses count without sign, padding not at all; the factor is that on tokens with an advantage."""
    ctx = CreditContext()
    rollout = build_rollout([[0.5] * 4, [0.5], [0.5] * 2])
    run_chain([PositionShaping()], rollout, full_credit(rollout, [-1.0, 1.0, 0.0]), ctx)
    wanted = {
        "bonus": (float(BONUS.sum()) + float(BONUS[0, 0])) / 7,
        "factor_min": 1 + float(BONUS[0, 0]),
        "factor_max": 1 + float(BONUS[0, 3]),
    }
    assert ctx.metrics == {f"credit/PositionShaping/{name}": pytest.approx(value) for name, value in wanted.items()}


def test_gamma_by_stage() -> None:
    """No bonus while accuracy rises; the log says which gamma it was."""
    chain: list[CreditCallback] = [StageDetector(at_step=3), PositionShaping(Schedule(rising=0.0, plateau=0.2))]
    for step, gamma in ((2, 0.0), (3, 0.2)):
        ctx = CreditContext(step=step)
        near(run_chain(chain, FOUR, full_credit(FOUR), ctx).advantage, 1 + BONUS * gamma / 0.1)
        assert ctx.metrics["credit/PositionShaping/gamma"] == gamma


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": -0.1}, "gamma must be >= 0, got -0.1"),
        ({"gamma": Schedule(rising=0.1, plateau=-0.1)}, "gamma must be >= 0, got -0.1"),
        ({"cap": -1.0}, "cap must be >= 0, got -1.0"),
        ({"first_step": 5, "last_step": 4}, "acts from step 5 to 4: that window is empty"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    """A window of one phase is fine."""
    with pytest.raises(ValueError, match=message):
        PositionShaping(**options)
    assert PositionShaping(first_step=4, last_step=4).last_step == 4
