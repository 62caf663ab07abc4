"""NegativeReinforcement and PositiveNegative: what the two sides of a group's outcome learn."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lit_rlvr_callbacks import DefectPenalty, NegativeReinforcement, PositiveNegative
from rollouts import build_rollout, full_credit, phases
from torch.testing import assert_close

from lit_rlvr.advantages import BatchNormalized, GroupCentred, GroupNormalized, LeaveOneOut, Raw
from lit_rlvr.credit import CreditCallback, CreditContext, assign_credit, observe, shape_rewards
from lit_rlvr.schedule import Schedule
from lit_rlvr.shaping import DynamicSampling
from lit_rlvr.types import Credit, RolloutBatch

few = settings(max_examples=40, deadline=None, derandomize=True)
FOUR = replace(
    build_rollout([[0.5], [0.5], [0.5], [0.5]]),
    correct=torch.tensor([1.0, 0.0, 1.0, 0.0]),
    rewards=torch.tensor([1.0, 0.0, 0.5, 0.25]),
)


def rewards(chain: list[CreditCallback], rollout: RolloutBatch = FOUR) -> list[float]:
    """The rewards after a chain."""
    ctx = CreditContext()
    observe(chain, rollout, ctx)
    shaped: list[float] = shape_rewards(chain, rollout, ctx).tolist()
    return shaped


@pytest.mark.parametrize(("right", "wrong"), [(1.0, 0.0), (0.0, -1.0), (0.5, -1.0)])
def test_the_papers_maps(right: float, wrong: float) -> None:
    """PSR, NSR and W-REINFORCE, by the outcome, whatever the task's reward."""
    assert rewards([NegativeReinforcement(right, wrong)]) == [right, wrong, right, wrong]


def test_what_came_before_stays() -> None:
    """A defect costs what it costs, on either side of the map."""
    rollout = replace(FOUR, texts=("fine", "boxed{" * 5, "boxed{" * 5, "fine"))
    penalty, map_ = DefectPenalty(0.25), NegativeReinforcement(0.5, -1.0)
    assert rewards([penalty, map_], rollout) == [0.5, -1.25, 0.25, -1.0]
    assert rewards([map_, penalty], rollout) == [0.5, -1.25, 0.25, -1.0]


@pytest.mark.parametrize("advantage", [GroupNormalized(), GroupCentred(), LeaveOneOut(), BatchNormalized()])
def test_under_a_baseline_the_maps_are_all_the_same(advantage: Any) -> None:
    """Up to a factor, and under normalisation not even that; which is why they are refused there."""
    group = torch.zeros(4)
    psr, nsr, weighted = (
        advantage(torch.tensor(rewards([NegativeReinforcement(*m)])).double(), group)
        for m in ((1.0, 0.0), (0.0, -1.0), (0.5, -1.0))
    )
    assert_close(psr, nsr)
    scale = 1.5 if isinstance(advantage, GroupCentred | LeaveOneOut) else 1.0
    # The epsilons beside the deviations, 1e-6 of about .5, are the rest.
    assert_close(weighted, psr * scale, rtol=1e-5, atol=1e-5)
    module: Any = SimpleNamespace(advantage=advantage, dynamic_sampling=None)
    with pytest.raises(
        ValueError, match=f"changes nothing under advantage {type(advantage).__name__}, .* use advantage: Raw"
    ):
        NegativeReinforcement().check(module)


def test_without_a_baseline_they_are_accepted_and_dynamic_sampling_is_not() -> None:
    """It would drop the groups that NSR learns most from."""
    NegativeReinforcement().check(SimpleNamespace(advantage=Raw(), dynamic_sampling=None))  # type: ignore[arg-type]
    module: Any = SimpleNamespace(advantage=Raw(), dynamic_sampling=DynamicSampling(2))
    with pytest.raises(ValueError, match=r"^NegativeReinforcement learns from .* set dynamic_sampling: null"):
        NegativeReinforcement().check(module)


def test_sides_by_hand() -> None:
    """A side at 0 leaves both sums; a factor leaves the denominator; A = 0 stays in it."""
    rollout = build_rollout([[0.5, 0.5], [0.5], [0.5]])
    credit, ctx = full_credit(rollout, [1.0, -1.0, 0.0]), CreditContext()
    after = assign_credit([PositiveNegative(0.0, 0.5)], rollout, credit, ctx)
    assert after.weight.tolist() == [[0, 0], [0.5, 0], [1, 0]]
    assert after.count.tolist() == [[0, 0], [1, 0], [1, 0]]
    assert after.advantage is credit.advantage
    assert ctx.metrics == {"credit/PositiveNegative/positive": 0.5, "credit/PositiveNegative/negative": 0.25}


def test_scheduled_sides() -> None:
    """The positive side comes in over ten phases; its factor is logged."""
    rollout = build_rollout([[0.5], [0.5]])
    callback = PositiveNegative(Schedule("linear", 0.0, 1.0, 10))
    for step, factor in ((0, 0.0), (5, 0.5), (10, 1.0)):
        ctx = CreditContext(step=step)
        after = assign_credit([callback], rollout, full_credit(rollout, [1.0, -1.0]), ctx)
        assert after.weight.tolist() == [[factor], [1]]
        assert after.count.tolist() == [[float(factor > 0)], [1]]
        assert ctx.metrics["credit/PositiveNegative/factor_positive"] == factor
        assert ctx.metrics["credit/PositiveNegative/factor_negative"] == 1


@few
@given(phases(), st.sampled_from([(0.0, 1.0), (1.0, 0.0), (0.3, 2.0)]))
def test_sides_against_numpy(phase: tuple[RolloutBatch, Credit], factors: tuple[float, float]) -> None:
    """The loss is that of the chosen side alone, over that side's tokens and those without an advantage."""
    rollout, credit = phase
    after = assign_credit([PositiveNegative(*factors)], rollout, credit, CreditContext())
    a, w, c = (t.double().numpy() for t in (credit.advantage, credit.weight, credit.count))
    side = np.where(a > 0, factors[0], np.where(a < 0, factors[1], 1.0))
    assert_close(after.weight.numpy(), (w * side).astype("float32"))
    assert_close(after.count.numpy(), (c * (side > 0)).astype("float32"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NegativeReinforcement(-0.1), "needs right >= 0 >= wrong, not both 0; got -0.1 and -1.0"),
        (lambda: NegativeReinforcement(1.0, 0.5), "got 1.0 and 0.5"),
        (lambda: NegativeReinforcement(0.0, 0.0), "got 0.0 and 0.0"),
        (lambda: PositiveNegative(-1.0), "needs factors >= 0, not both 0; got -1.0 and 1.0"),
        (lambda: PositiveNegative(0.0, 0.0), "got 0.0 and 0.0"),
    ],
)
def test_options_out_of_range_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
