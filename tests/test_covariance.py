"""ClipCov and KLCov against hand-computed values and the authors' rule in NumPy."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lit_rlvr_callbacks import ClipCov, KLCov
from rollouts import build_rollout, current_policy, full_credit, phases, run_ranks
from torch import Tensor

from lit_rlvr.credit import CreditCallback, CreditContext, assign_credit
from lit_rlvr.losses import ClippedSurrogate
from lit_rlvr.types import Credit, Current, RolloutBatch

few = settings(max_examples=40, deadline=None, derandomize=True)
FOUR = build_rollout([[0.5, 0.5], [0.5, 0.5]], [[-1.0, -3.0], [-1.0, -3.0]])
CREDIT = full_credit(FOUR, [1.0, -1.0])
"""Means 0 and -2, so the covariances are 1, -1 and -1, 1."""


def assigned(
    callback: CreditCallback, rollout: RolloutBatch, credit: Credit, current: Current | None = None, update: int = 0
) -> tuple[Credit, dict[str, float]]:
    """What the callback makes of a mini-batch under ``current``, by default the old policy."""
    ctx = CreditContext(update=update, current=current or Current(rollout.old_logprobs, rollout.entropies))
    return assign_credit([callback], rollout, credit, ctx, callback.scope), ctx.metrics


def kl_coef(credit: Credit) -> list[list[float]]:
    assert credit.kl_coef is not None
    rows: list[list[float]] = credit.kl_coef.tolist()
    return rows


def test_kl_cov_by_hand() -> None:
    """The largest covariance is tied: the earlier position wins. Advantage, weight and count stay."""
    after, metrics = assigned(KLCov(0.25, 0.7), FOUR, CREDIT)
    assert kl_coef(after) == [[pytest.approx(0.7), 0], [0, 0]]
    assert after.weight is CREDIT.weight
    assert after.count is CREDIT.count
    assert metrics == {
        "credit/KLCov/held_fraction": 0.25, "credit/KLCov/covariance": 0.0, "credit/KLCov/covariance_held": 1.0,
    }  # fmt: skip
    assert kl_coef(assigned(KLCov(0.5), FOUR, CREDIT)[0]) == [[1, 0], [0, 1]]
    assert kl_coef(assigned(KLCov(1e-6), FOUR, CREDIT)[0]) == [[1, 0], [0, 0]], "at least one, as in the authors' code"


def test_clip_cov_by_hand() -> None:
    """Only the two of covariance 1 stand between the bounds; their count stays."""
    after, metrics = assigned(ClipCov(0.5, 0.5, 5.0), FOUR, CREDIT)
    assert after.weight.tolist() == [[0, 1], [1, 0]]
    assert after.count is CREDIT.count
    assert after.kl_coef is None
    assert metrics == {
        "credit/ClipCov/candidates": 0.5, "credit/ClipCov/dropped_fraction": 0.5, "credit/ClipCov/covariance": 0.0,
    }  # fmt: skip
    assert assigned(ClipCov(1.0, 0.5, 5.0), FOUR, CREDIT)[0].weight.sum() == 2, "never more than the candidates"
    assert assigned(ClipCov(0.5, 1.0, 5.0), FOUR, CREDIT)[0].weight.sum() == 4, "the bounds themselves are outside"


def test_what_the_ratio_clip_holds_back_is_no_candidate() -> None:
    """The first token's ratio is e^.5, above the upper clip, and its advantage positive."""
    moved = Current(torch.tensor([[-0.5, -3.5], [-1.0, -3.0]]), FOUR.entropies)
    callback = ClipCov(1.0, 0.5, 5.0)
    assert assigned(callback, FOUR, CREDIT, moved)[0].weight.tolist() == [[0, 1], [1, 0]]
    callback.check(SimpleNamespace(loss=ClippedSurrogate(0.2, 0.28)))  # type: ignore[arg-type]
    assert assigned(callback, FOUR, CREDIT, moved)[0].weight.tolist() == [[1, 1], [1, 0]]
    callback.check(SimpleNamespace(loss=ClippedSurrogate(0.2, 0.7)))  # type: ignore[arg-type]
    assert assigned(callback, FOUR, CREDIT, moved)[0].weight.tolist() == [[0, 1], [1, 0]]


def test_the_current_policy_decides() -> None:
    """Turned round, the other two tokens have the large covariance."""
    turned = Current(-4 - FOUR.old_logprobs, FOUR.entropies)
    assert kl_coef(assigned(KLCov(0.5), FOUR, CREDIT, turned)[0]) == [[0, 1], [1, 0]]
    assert assigned(ClipCov(0.5, 0.5), FOUR, CREDIT, turned)[0].weight.tolist() == [[1, 0], [0, 1]]


def test_the_penalty_has_the_tokens_share_in_the_average() -> None:
    """Under a sequence mean a token of two counts one half; what others hold already is added to."""
    half = replace(CREDIT, weight=CREDIT.weight / 2, count=CREDIT.count / 2)
    assert kl_coef(assigned(KLCov(0.5, 3.0), FOUR, half)[0]) == [[1.5, 0], [0, 1.5]]
    earlier = replace(CREDIT, kl_coef=torch.tensor([[1.0, 2.0], [0.0, 0.0]]))
    assert kl_coef(assigned(KLCov(0.5, 3.0), FOUR, earlier)[0]) == [[4, 2], [0, 3]]


def flat(values: Tensor, where: Any) -> Any:
    """The chosen tokens of a tensor [B, T] in float64."""
    return values.double().numpy()[where]


@few
@given(phases(), st.floats(0.001, 1.0), st.integers(0, 10**6), st.booleans())
def test_against_numpy(phase: tuple[RolloutBatch, Credit], ratio: float, update: int, moved: bool) -> None:
    """The rule of the authors' code: means over all tokens, the top max(1, int(ratio n)), or as many of those between
    the bounds that the ratio clip leaves."""
    rollout, credit = phase
    current = current_policy(rollout) if moved else Current(rollout.old_logprobs, rollout.entropies)
    where = credit.weight.numpy() > 0
    n = int(where.sum())
    number = max(1, int(ratio * n)) if n else 0
    advantage, logp = flat(credit.advantage, where), flat(current.logprobs, where)
    cov = (advantage - advantage.mean()) * (logp - logp.mean()) if n else advantage

    scope: Any
    for scope in ("mini_batch", "micro_batch"):
        after, _ = assigned(KLCov(ratio, scope=scope), rollout, replace(credit, count=credit.weight), current)
        held = np.zeros(n, bool) if after.kl_coef is None else flat(after.kl_coef, where) > 0
        assert held.sum() == number
        # Covariances are compared as float32, by steps of 6e-8 of their size.
        assert not n or number == n or cov[held].min() >= cov[~held].max() - 1e-6 * max(1.0, np.abs(cov).max())

        callback = ClipCov(ratio, -0.5, 2.0, scope)
        callback.check(SimpleNamespace(loss=ClippedSurrogate(0.2, 0.28)))  # type: ignore[arg-type]
        after, _ = assigned(callback, rollout, credit, current, update)
        dropped = (after.weight.numpy() == 0)[where]
        r = np.exp(logp - flat(rollout.old_logprobs, where))
        clipped = -advantage * r.clip(0.8, 1.28) > -advantage * r
        candidates = (cov > -0.5) & (cov < 2.0) & ~clipped
        assert dropped.sum() == min(number, candidates.sum())
        assert not (dropped & ~candidates).any()
        assert after.count is credit.count


def test_each_candidate_is_drawn_equally_often() -> None:
    """Three of six, anew in every update: each pair of tokens has its turn."""
    rollout = build_rollout([[0.5] * 6, [0.5] * 6], [[-1.0] * 6, [-3.0] * 6])
    credit = full_credit(rollout, [1.0, 0.0])
    drawn: Counter[int] = Counter()
    for update in range(300):
        after, _ = assigned(ClipCov(0.25, 0.4, 0.6), rollout, credit, update=update)
        drawn.update(after.weight.flatten().eq(0).nonzero().flatten().tolist())
    # All 12 have covariance 1/2. A binomial count of mean 75 and deviation 7.5; five of them.
    assert sorted(drawn) == list(range(12))
    assert all(abs(count - 75) < 38 for count in drawn.values())


def test_seed_and_phase_decide_too() -> None:
    """Two runs draw differently, and one run twice the same."""
    rollout = build_rollout([[0.5] * 30, [0.5] * 30], [[-1.0] * 30, [-3.0] * 30])
    later = build_rollout([[0.5] * 30, [0.5] * 30], [[-1.0] * 30, [-3.0] * 30], phase=1)
    credit, callback = full_credit(rollout, [1.0, 0.0]), ClipCov(0.25, 0.4, 0.6)

    def weight(rollout: RolloutBatch, seed: int) -> Tensor:
        ctx = CreditContext(seed=seed, current=Current(rollout.old_logprobs, rollout.entropies))
        return assign_credit([callback], rollout, credit, ctx, "mini_batch").weight

    assert torch.equal(weight(rollout, 0), weight(rollout, 0))
    assert not torch.equal(weight(rollout, 0), weight(rollout, 1))
    assert not torch.equal(weight(rollout, 0), weight(later, 0))


def test_equal_advantages_leave_only_the_order_of_tokens() -> None:
    """Rounding of the mean must not choose: all covariances are 0, on one rank as on two."""
    rollout = build_rollout([[0.5] * 3] * 4, [[-1.0, -2.0, -3.0], [-4.0, -0.1, -0.2]] * 2, [0, 0, 1, 1])
    credit = full_credit(rollout, [0.1] * 4)
    whole, _ = assigned(KLCov(0.34), rollout, credit)
    assert kl_coef(whole) == [[1, 0, 0]] * 4

    def rank(reduce: Any) -> Credit:
        rows = torch.tensor([0, 1]) if reduce.rank else torch.tensor([2, 3])
        mine = rollout.rows(rows)
        ctx = CreditContext(reduce=reduce, current=Current(mine.old_logprobs, mine.entropies))
        return assign_credit([KLCov(0.34)], mine, credit.rows(rows), ctx, "mini_batch")

    assert [kl_coef(part) for part in run_ranks(2, rank)] == [[[1, 0, 0]] * 2] * 2


def test_a_micro_batch_is_for_itself_on_each_rank() -> None:
    """Each rank holds its own largest, and both log the mean over both."""

    def rank(reduce: Any) -> tuple[Credit, dict[str, float]]:
        mine = FOUR.rows(torch.tensor([0, 1] if reduce.rank else []).long())
        credit = CREDIT.rows(torch.tensor([0, 1] if reduce.rank else []).long())
        ctx = CreditContext(reduce=reduce, current=Current(mine.old_logprobs, mine.entropies))
        return assign_credit([KLCov(0.25, scope="micro_batch")], mine, credit, ctx, "micro_batch"), ctx.metrics

    (empty, first), (full, second) = run_ranks(2, rank)
    assert empty.kl_coef is None
    assert kl_coef(full) == [[1, 0], [0, 0]]
    assert first == second
    assert first["credit/KLCov/held_fraction"] == 0.25


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KLCov(-0.1), r"KLCov.ratio is a fraction in \[0, 1\], not percent; got -0.1"),
        (lambda: ClipCov(2.0), r"ClipCov.ratio is a fraction in \[0, 1\], not percent; got 2.0"),
        (lambda: KLCov(scope="phase"), "KLCov.scope must be mini_batch or micro_batch, got 'phase'"),  # type: ignore[arg-type]
        (lambda: KLCov(coefficient=-1.0), "KLCov.coefficient must be >= 0, got -1.0"),
        (lambda: ClipCov(low=5.0, high=1.0), "low < covariance < high, got 5.0 and 1.0"),
    ],
)
def test_options_out_of_range_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
