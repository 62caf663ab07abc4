"""PerplexityShaping against hand-computed values and the published formula in NumPy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from lit_rlvr_callbacks import PerplexityShaping
from lit_rlvr_callbacks.perplexity import standardise
from rollouts import build_rollout, full_credit, phases, run_chain
from torch import Tensor
from torch.testing import assert_close

from lit_rlvr.credit import CreditContext
from lit_rlvr.schedule import Schedule
from lit_rlvr.types import Credit, RolloutBatch

few = settings(max_examples=40, deadline=None, derandomize=True)
near = partial(assert_close, check_dtype=False)
"""Closeness in float32, of float32 results to values in float64."""


def rollout_of(log_ppl: Sequence[float], group: Sequence[int] | None = None, length: int = 2) -> RolloutBatch:
    """Responses of ``length`` tokens whose mean log-probability is minus ``log_ppl``, unequal within a response."""
    rows = [[-value - 1.0] + [-value + 1.0] + [-value] * (length - 2) for value in log_ppl]
    return build_rollout(rows, rows, group)


def factors(rollout: RolloutBatch, alpha: float, favour: Any = "low") -> Tensor:
    """What advantages of 1 become, one number per response."""
    after = run_chain([PerplexityShaping(alpha, favour)], rollout, full_credit(rollout), CreditContext()).advantage
    assert bool(((after == after[:, :1]) | ~rollout.response_mask).all())
    return after[:, 0]


def reference(rollout: RolloutBatch, credit: Credit, alpha: float) -> tuple[Any, list[float]]:
    """A * clamp(1 - alpha w, .8, 1.2) in float64, as in Deng et al. 2025 and its code, and each row's deviation."""
    logp, mask = rollout.old_logprobs.double().numpy(), rollout.response_mask.numpy()
    log_ppl = np.array([-row[m].mean() for row, m in zip(logp, mask, strict=True)])
    after, sigmas = credit.advantage.double().numpy().copy(), []
    for i in range(len(rollout)):
        same = log_ppl[rollout.group.numpy() == int(rollout.group[i])]
        q1, q3 = np.percentile(same, [25, 75])
        inliers = same[(same >= q1 - 1.5 * (q3 - q1)) & (same <= q3 + 1.5 * (q3 - q1))]
        sigmas.append(float(inliers.std()))
        w = (log_ppl[i] - inliers.mean()) / (sigmas[i] if sigmas[i] > 1e-6 else 1.0)
        after[i] *= np.clip(1 - alpha * w, 0.8, 1.2)
    return after, sigmas


def test_two_responses_by_hand() -> None:
    """log PPL 1 and 3: mean 2, population deviation 1, so w = -1 and 1."""
    near(factors(rollout_of([1.0, 3.0]), 0.1), torch.tensor([1.1, 0.9]).double())
    near(factors(rollout_of([1.0, 3.0]), 0.1, "high"), torch.tensor([0.9, 1.1]).double())


def test_the_clamp() -> None:
    """A strong alpha stops at .8 and 1.2."""
    near(factors(rollout_of([1.0, 3.0]), 0.5), torch.tensor([1.2, 0.8]).double())


def test_each_prompt_is_its_own_population() -> None:
    """Rows of two groups mixed: (1, 3) and (10, 10, 13), the latter with mean 11 and deviation sqrt 2."""
    rollout = rollout_of([10.0, 1.0, 13.0, 3.0, 10.0], [7, 2, 7, 2, 7])
    w = torch.tensor([-1 / math.sqrt(2), -1, 2 / math.sqrt(2), 1, -1 / math.sqrt(2)]).double()
    near(factors(rollout, 0.1), 1 - 0.1 * w)


def test_outliers_leave_mean_and_deviation_but_are_scored() -> None:
    """1, 2, 3, 4, 9: quartiles 2 and 4 reach from -1 to 7, so mean 2.5 and deviation sqrt 1.25 are of 1 to 4."""
    w = (torch.tensor([1.0, 2.0, 3.0, 4.0, 9.0]).double() - 2.5) / math.sqrt(1.25)
    near(factors(rollout_of([1.0, 2.0, 3.0, 4.0, 9.0]), 0.02), 1 - 0.02 * w)
    # 7 lies on the upper fence and still counts: mean 3.4, variance 21.2 / 5. Mirrored, 1 lies on the lower one.
    w = (torch.tensor([1.0, 2.0, 3.0, 4.0, 7.0]).double() - 3.4) / math.sqrt(21.2 / 5)
    near(factors(rollout_of([1.0, 2.0, 3.0, 4.0, 7.0]), 0.02), 1 - 0.02 * w)
    near(factors(rollout_of([7.0, 6.0, 5.0, 4.0, 1.0]), 0.02), 1 + 0.02 * w)


def test_an_outlier_reaches_the_clamp_at_the_papers_alpha() -> None:
    """|w| <= sqrt(7) at 8 responses only holds without outliers: seven alike and one far off move it by 20 %."""
    alike = [1.0, 1.01, 1.02, 1.03, 1.04, 1.05, 1.06]
    factor = factors(rollout_of([*alike, 3.0]), 0.01)
    assert float(factor[-1]) == pytest.approx(0.8)
    assert float((factor[:-1] - 1).abs().max()) < 0.01 * math.sqrt(7)


@pytest.mark.parametrize(("gap", "w"), [(0.0, 0.0), (1.5e-6, 7.5e-7), (2.5e-6, 1.0), (1e-4, 1.0)])
def test_a_deviation_of_at_most_a_millionth_counts_as_one(gap: float, w: float) -> None:
    """Log-perplexities 0 and ``gap`` have the deviation ``gap`` / 2; alpha is .1."""
    rollout = build_rollout([[0.0], [0.0]], [[0.0], [-gap]])
    near(factors(rollout, 0.1), torch.tensor([1 + 0.1 * w, 1 - 0.1 * w]).double())


def test_a_single_response_is_its_own_mean() -> None:
    """Deviation 0, so the factor is 1."""
    assert factors(rollout_of([4.0]), 0.5).tolist() == [1.0]


def test_lengths_are_averaged_over_and_padding_is_not_read() -> None:
    """Long and short responses of one mean log-probability are equally perplexing."""
    rollout = build_rollout([[0.0] * 4, [0.0], [0.0] * 2], [[-1.0, -3.0, -2.0, -2.0], [-2.0], [-4.0, -2.0]])
    # log PPL 2, 2 and 3: mean 7/3, variance 2/9.
    w = torch.tensor([-1.0, -1.0, 2.0]).double() / 3 / math.sqrt(2 / 9)
    near(factors(rollout, 0.05), 1 - 0.05 * w)
    filled = torch.where(rollout.response_mask, rollout.old_logprobs, -50.0)
    assert torch.equal(factors(replace(rollout, old_logprobs=filled), 0.05), factors(rollout, 0.05))


def test_only_the_advantage_changes() -> None:
    """Signs are kept, 0 stays 0, weight and count stay."""
    rollout = rollout_of([1.0, 3.0, 1.0, 3.0], [0, 0, 1, 1])
    credit = full_credit(rollout, [-2.0, 0.0, 4.0, -1.0])
    after = run_chain([PerplexityShaping(0.1)], rollout, credit, CreditContext())
    assert_close(after.advantage[:, 0], torch.tensor([-2.2, 0.0, 4.4, -0.9]))
    assert after.weight is credit.weight
    assert after.count is credit.count


@few
@given(phases(), st.floats(0, 0.5), st.sampled_from(["low", "high"]))
def test_against_numpy(phase: tuple[RolloutBatch, Credit], alpha: float, favour: Any) -> None:
    """The formula in float64, for groups of all sizes.

    The callback averages float32 log-probabilities, so log PPL (below 10) is off by 1e-6 at most, and w by that over
    the deviation, which is 1e-2 at least or 0; alpha is at most .5. Hence 5e-5.
    """
    rollout, credit = phase
    wanted, sigmas = reference(rollout, credit, alpha if favour == "low" else -alpha)
    assume(all(sigma == 0 or sigma > 1e-2 for sigma in sigmas))
    after = run_chain([PerplexityShaping(alpha, favour)], rollout, credit, CreditContext()).advantage
    assert_close(after.double().numpy(), wanted, rtol=5e-5, atol=1e-6)


@few
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=9))
def test_there_are_always_inliers(values: list[float]) -> None:
    """So "all are kept if none is left" is never needed: the lower median is at most Q3 and no further below Q1 than
    Q3 - Q1, for quartiles that are interpolated linearly."""
    middle = sorted(values)[(len(values) - 1) // 2]
    q1, q3 = np.percentile(values, [25, 75])
    rounding = 1e-9 * max(map(abs, values))
    assert q1 - 1.5 * (q3 - q1) - rounding <= middle <= q3 + 1.5 * (q3 - q1) + rounding


def by_group(values: Tensor, group: Tensor) -> Tensor:
    """What ``standardise`` does, one group at a time."""
    scores = torch.zeros_like(values, dtype=torch.float64)
    for number in group.unique():
        rows = group == number
        members = values[rows].double()
        low, high = torch.quantile(members, torch.tensor([0.25, 0.75]).to(members))
        reach = 1.5 * (high - low)
        inliers = members[(members >= low - reach) & (members <= high + reach)]
        deviation = inliers.std(correction=0)
        scores[rows] = (members - inliers.mean()) / torch.where(deviation > 1e-6, deviation, 1.0)
    return scores


def test_thousands_of_groups_at_once_are_as_one_by_one() -> None:
    """2000 groups of 1 to 9 responses, rows mixed, some far off; and no rows at all."""
    generator = torch.Generator().manual_seed(0)
    size = torch.randint(1, 10, (2000,), generator=generator)
    group = torch.arange(2000).repeat_interleave(size)
    group = group[torch.randperm(len(group), generator=generator)] * 7
    values = torch.randn(len(group), generator=generator, dtype=torch.float64).pow(3)
    assert_close(standardise(values, group), by_group(values, group))
    assert standardise(values[:0], group[:0]).shape == (0,)


def test_alpha_by_schedule() -> None:
    """Linear from 0 to .1 over two phases: half of it in phase 1, and the log says so."""
    rollout, schedule = rollout_of([1.0, 3.0]), Schedule(start=0.0, end=0.1, phases=2)
    for step, alpha in ((0, 0.0), (1, 0.05), (2, 0.1), (3, 0.1)):
        ctx = CreditContext(step=step)
        after = run_chain([PerplexityShaping(schedule)], rollout, full_credit(rollout), ctx).advantage
        near(after[:, 0], torch.tensor([1 + alpha, 1 - alpha]).double())
        assert ctx.metrics["credit/PerplexityShaping/alpha"] == pytest.approx(alpha)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": -0.1}, r"alpha must be >= 0, got -0\.1; favour: high turns it round"),
        ({"alpha": Schedule(start=0.1, end=-0.2, phases=3)}, r"alpha must be >= 0, got -0\.2"),
        ({"favour": "both"}, "favour must be low or high, got 'both'"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    """In a sentence that says what to use."""
    with pytest.raises(ValueError, match=message):
        PerplexityShaping(**options)


def test_metrics_by_hand() -> None:
    """Mean log-perplexity of responses (not tokens), and the mean distance of the factor from 1."""
    ctx = CreditContext()
    rollout = rollout_of([1.0, 3.0, 5.0], [0, 0, 1], length=3)
    run_chain([PerplexityShaping(0.1)], rollout, full_credit(rollout), ctx)
    assert ctx.metrics == {
        "credit/PerplexityShaping/log_perplexity": pytest.approx(3.0),
        "credit/PerplexityShaping/factor_deviation": pytest.approx(0.2 / 3),
        "credit/PerplexityShaping/factor_min": pytest.approx(0.9),
        "credit/PerplexityShaping/factor_max": pytest.approx(1.1),
    }
