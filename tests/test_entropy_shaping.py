"""EntropyAdvantage and ZeroVariance against hand-computed values and the published formulas in NumPy."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lit_rlvr_callbacks import EntropyAdvantage, ZeroVariance
from rollouts import build_rollout, current_policy, full_credit, phases
from torch.testing import assert_close

from lit_rlvr.credit import CreditCallback, CreditContext, assign_credit
from lit_rlvr.kl import KLPenalty
from lit_rlvr.schedule import Schedule
from lit_rlvr.shaping import DynamicSampling
from lit_rlvr.types import Credit, Current, RolloutBatch

near = partial(assert_close, check_dtype=False)
few = settings(max_examples=40, deadline=None, derandomize=True)


def assigned(
    callback: CreditCallback, rollout: RolloutBatch, credit: Credit, current: Current | None = None
) -> tuple[Credit, dict[str, float]]:
    """The callback in its own scope."""
    ctx = CreditContext(current=current)
    return assign_credit([callback], rollout, credit, ctx, callback.scope), ctx.metrics


def test_entropy_advantage_by_hand() -> None:
    """alpha H where that is below |A| / kappa; the bonus is positive for either sign and none where A is 0."""
    rollout = build_rollout([[0.0, 1.0, 2.0], [1.0, 3.0], [1.0]])
    after, metrics = assigned(EntropyAdvantage(0.4, 2.0), rollout, full_credit(rollout, [1.0, -2.0, 0.0]))
    near(after.advantage, torch.tensor([[1.0, 1.4, 1.5], [-1.6, -1.0, 0.0], [0.0, 0.0, 0.0]]))
    bonus = (0.0 + 0.4 + 0.5 + 0.4 + 1.0 + 0.0) / 6
    assert metrics == {
        "credit/EntropyAdvantage/bonus": pytest.approx(bonus), "credit/EntropyAdvantage/capped": pytest.approx(2 / 5),
    }  # fmt: skip


@pytest.mark.parametrize("make", [EntropyAdvantage, ZeroVariance])
def test_a_scheduled_alpha_is_logged(make: Any) -> None:
    """Half way between 0 and .4 it is .2; and no end of a schedule may be negative."""
    rollout = build_rollout([[1.0]])
    ctx = CreditContext(step=5)
    callback, fixed = make(Schedule("linear", 0.0, 0.4, 10)), make(0.2)
    one, other = (assign_credit([c], rollout, full_credit(rollout, [4.0]), ctx) for c in (callback, fixed))
    assert torch.equal(one.advantage, other.advantage)
    assert ctx.metrics[f"credit/{callback.name}/alpha"] == pytest.approx(0.2)
    with pytest.raises(ValueError, match=f"{callback.name}"):
        make(Schedule("linear", 0.1, -0.1, 10))


def test_zero_variance_by_hand() -> None:
    """All right: alpha H. All wrong: what is missing to the response's largest H, with a minus. Mixed: as it was."""
    rollout = build_rollout([[0.0, 1.0], [3.0], [1.0, 2.0, 0.5], [0.5], [1.0, 2.0], [1.0]], group=[0, 0, 1, 1, 2, 2])
    outcome = torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0, 0.0])
    rollout = replace(rollout, rewards=outcome, correct=outcome)
    after, metrics = assigned(ZeroVariance(0.1), rollout, full_credit(rollout, [0.0, 0.0, 0.0, 0.0, 0.7, -0.7]))
    wanted = [[0.0, 0.1, 0.0], [0.3, 0.0, 0.0], [-0.1, 0.0, -0.15], [0.0] * 3, [0.7, 0.7, 0.0], [-0.7, 0.0, 0.0]]
    near(after.advantage, torch.tensor(wanted))
    assert metrics == {
        "credit/ZeroVariance/right": pytest.approx(1 / 3), "credit/ZeroVariance/wrong": pytest.approx(1 / 3),
        "credit/ZeroVariance/advantage": pytest.approx(0.65 / 7),
    }  # fmt: skip


def test_rewards_that_differ_have_variance() -> None:
    """An overlong penalty inside an all-right group gives the base advantage something to say; nor is a group of equal
    rewards but mixed outcomes all right or all wrong."""
    rollout = build_rollout([[1.0], [1.0]])
    rollout = replace(rollout, correct=torch.ones(2), rewards=torch.tensor([1.0, 0.5]))
    credit = full_credit(rollout, [0.7, -0.7])
    assert torch.equal(assigned(ZeroVariance(), rollout, credit)[0].advantage, credit.advantage)
    mixed = replace(rollout, correct=torch.tensor([1.0, 0.0]), rewards=torch.ones(2))
    assert torch.equal(assigned(ZeroVariance(), mixed, credit)[0].advantage, credit.advantage)


@few
@given(phases(), st.floats(0, 2), st.floats(1.01, 10), st.booleans())
def test_entropy_advantage_against_numpy(
    phase: tuple[RolloutBatch, Credit], alpha: float, kappa: float, old: bool
) -> None:
    """A + min(alpha H, |A| / kappa), on the old or the current policy's H, and never another sign."""
    rollout, credit = phase
    current = None if old else current_policy(rollout)
    entropy = (rollout.entropies if current is None else current.entropies).double().numpy()
    a = credit.advantage.double().numpy()
    wanted = a + np.minimum(alpha * entropy, np.abs(a) / kappa) * rollout.response_mask.numpy()
    scope: Any
    for scope in ["phase"] if old else ["mini_batch", "micro_batch"]:
        after, _ = assigned(EntropyAdvantage(alpha, kappa, scope), rollout, credit, current)
        near(after.advantage.numpy(), wanted.astype("float32"))
        assert torch.equal(after.advantage.sign(), credit.advantage.sign())
        assert after.weight is credit.weight
        assert after.count is credit.count


@few
@given(phases(), st.floats(0, 2), st.booleans())
def test_zero_variance_against_numpy(phase: tuple[RolloutBatch, Credit], alpha: float, old: bool) -> None:
    """RL-ZVP, Eq. 5, row by row."""
    rollout, credit = phase
    current = None if old else current_policy(rollout)
    entropy = (rollout.entropies if current is None else current.entropies).double().numpy()
    wanted = credit.advantage.double().numpy().copy()
    rewards, group = rollout.rewards.numpy(), rollout.group.numpy()
    for i, length in enumerate(rollout.lengths.tolist()):
        if rewards[group == group[i]].std() == 0:
            h = entropy[i, :length]
            wanted[i, :length] = alpha * h if rewards[i] > 0 else -alpha * (h.max() - h)
    after, _ = assigned(ZeroVariance(alpha, "phase" if old else "mini_batch"), rollout, credit, current)
    near(after.advantage.numpy(), wanted.astype("float32"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dynamic_sampling": DynamicSampling(2)}, "dynamic_sampling drops them; set dynamic_sampling: null"),
        ({"kl": KLPenalty(where="reward")}, "with kl.where: reward none are; use kl.where: loss"),
    ],
)
def test_runs_without_such_groups_are_refused(options: dict[str, Any], message: str) -> None:
    module: dict[str, Any] = {"dynamic_sampling": None, "kl": None}
    ZeroVariance().check(SimpleNamespace(**module))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"^ZeroVariance .* {message}"):
        ZeroVariance().check(SimpleNamespace(**module | options))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EntropyAdvantage(-0.1), "alpha >= 0 and kappa > 1, got -0.1 and 2.0"),
        (lambda: EntropyAdvantage(0.4, 1.0), "alpha >= 0 and kappa > 1, got 0.4 and 1.0"),
        (lambda: EntropyAdvantage(scope="batch"), "must be phase, mini_batch or micro_batch, got 'batch'"),  # type: ignore[arg-type]
        (lambda: ZeroVariance(-0.1), "ZeroVariance.alpha must be >= 0, got -0.1"),
        (lambda: ZeroVariance(0.1, "micro_batch"), "which hold whole groups; got 'micro_batch'"),  # type: ignore[arg-type]
    ],
)
def test_options_out_of_range_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
