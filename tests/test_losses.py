"""Surrogates, aggregation, KL and reward shaping: hand-computed numbers, laws, NumPy and TRL."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close
from trl_source import trl_function, trl_loss

from lit_rlvr.aggregation import Aggregation, ConstantLength, SequenceMean, TokenMean
from lit_rlvr.kl import ESTIMATORS, KLPenalty, k1, k2, k3
from lit_rlvr.losses import ClippedSurrogate
from lit_rlvr.shaping import DynamicSampling, OverlongPenalty

LAWS = settings(max_examples=50, deadline=None, derandomize=True)
LOG_RATIO = st.floats(-3, 3)
ADVANTAGE = st.floats(-4, 4)
MASK = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]], dtype=torch.bool)


def f64(*values: float) -> Tensor:
    """A float64 vector."""
    return torch.tensor(values, dtype=torch.float64)


def value_and_slope(loss: ClippedSurrogate, log_ratio: Tensor, advantage: Tensor) -> tuple[Tensor, Tensor]:
    """The surrogate and its derivative with respect to the log-ratio."""
    x = log_ratio.clone().requires_grad_()
    objective = loss.surrogate(x, advantage)
    return objective.detach(), torch.autograd.grad(objective.sum(), x)[0]


# Clip at 0.8 and 1.28, dual clip at 3. Columns: ratio, advantage, surrogate, slope (ratio * advantage, or 0 if
# clipped), held back by the lower clip, by the upper clip.
TABLE = [
    (1.0, 2.0, 2.0, 2.0, False, False),
    (1.2, 2.0, 2.4, 2.4, False, False),
    (1.5, 2.0, 2.56, 0.0, False, True),
    (0.5, 2.0, 1.0, 1.0, False, False),
    (1.0, -2.0, -2.0, -2.0, False, False),
    (0.9, -2.0, -1.8, -1.8, False, False),
    (0.5, -2.0, -1.6, 0.0, True, False),
    (1.5, -2.0, -3.0, -3.0, False, False),
    (4.0, -2.0, -8.0, -8.0, False, False),
    (4.0, 2.0, 2.56, 0.0, False, True),
    (1.5, 0.0, 0.0, 0.0, False, False),
    (0.5, 0.0, 0.0, 0.0, False, False),
]


@pytest.mark.parametrize(("ratio", "advantage", "value", "slope", "low", "high"), TABLE)
def test_clipped_surrogate_by_hand(
    ratio: float, advantage: float, value: float, slope: float, low: bool, high: bool
) -> None:
    """Every side of both clips, with and without the dual clip."""
    log_ratio, a = f64(math.log(ratio)), f64(advantage)
    plain, dual = ClippedSurrogate(0.2, 0.28), ClippedSurrogate(0.2, 0.28, dual_clip=3.0)
    assert [t.item() for t in plain.clipped(log_ratio, a)] == [low, high]
    assert_close(value_and_slope(plain, log_ratio, a), (f64(value), f64(slope)))
    floored = advantage < 0 and ratio > 3
    want = (f64(3 * advantage), f64(0.0)) if floored else (f64(value), f64(slope))
    assert_close(value_and_slope(dual, log_ratio, a), want)


def test_default_bounds_are_those_of_dapo() -> None:
    """0.2 below, 0.28 above, no dual clip."""
    x = f64(-9.0, 9.0, 3.0)
    assert_close(ClippedSurrogate().surrogate(x, f64(-1, 1, -1)), f64(-0.8, 1.28, -math.exp(3)))


@given(LOG_RATIO, ADVANTAGE, st.floats(0, 1), st.floats(0, 2), st.none() | st.floats(1.001, 10))
@LAWS
def test_numpy_transcription(x: float, a: float, low: float, high: float, dual: float | None) -> None:
    """min(r A, clip(r) A), and for A < 0 at least c A."""
    r = np.exp(x)
    want = np.minimum(r * a, np.clip(r, 1 - low, 1 + high) * a)
    if dual is not None and a < 0:
        want = np.maximum(want, dual * a)
    assert_close(ClippedSurrogate(low, high, dual).surrogate(f64(x), f64(a)), f64(float(want)))


@given(LOG_RATIO, ADVANTAGE, st.floats(1.5, 10))
@LAWS
def test_surrogate_laws(x: float, a: float, dual: float) -> None:
    """Never above r A without the dual clip; bounded from both sides with it; the slope is r A, or 0 where clipped."""
    log_ratio, advantage = f64(x), f64(a)
    plain, bounded = ClippedSurrogate(0.2, 0.28), ClippedSurrogate(0.2, 0.28, dual)
    value, slope = value_and_slope(plain, log_ratio, advantage)
    assert float(value) <= math.exp(x) * a + 1e-12
    low, high = plain.clipped(log_ratio, advantage)
    assert_close(slope, torch.where(low | high, 0.0, log_ratio.exp() * advantage))
    limited = float(bounded.surrogate(log_ratio, advantage))
    assert min(0.0, dual * a) <= limited <= max(0.0, 1.28 * a)
    if a >= 0:
        assert limited == float(value)


def test_first_update_is_plain_policy_gradient() -> None:
    """At ratio 1 the surrogate is A and its slope is A, for any bounds, the tightest included."""
    a = f64(-2.0, 0.0, 3.0)
    for loss in (ClippedSurrogate(), ClippedSurrogate(0.0, 0.0), ClippedSurrogate(0.2, 0.2, dual_clip=3.0)):
        assert_close(value_and_slope(loss, torch.zeros_like(a), a), (a, a))


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"clip_low": -0.1}, "clip_low must lie in"),
        ({"clip_low": 1.1}, "clip_low must lie in"),
        ({"clip_high": -0.1}, "clip_high must be >= 0"),
        ({"dual_clip": 1.0}, "dual_clip must be > 1"),
    ],
)
def test_bounds_are_checked(bounds: dict[str, float], message: str) -> None:
    """A bound that would turn the objective around is refused."""
    with pytest.raises(ValueError, match=message):
        ClippedSurrogate(**bounds)


@pytest.mark.parametrize(
    ("rule", "share", "denominator"),
    [
        (TokenMean(), [[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]], 7.0),
        (SequenceMean(), [[0.25] * 4, [1, 0, 0, 0], [0.5, 0.5, 0, 0]], 3.0),
        (ConstantLength(10), [[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]], 30.0),
    ],
)
def test_aggregation_by_hand(rule: Aggregation, share: list[list[float]], denominator: float) -> None:
    """What each token starts with, and what the sum is divided by."""
    got = rule.share(MASK)
    assert_close(got, torch.tensor(share, dtype=torch.float32))
    assert rule.denominator(float(got.sum()), len(MASK)) == pytest.approx(denominator)


def test_an_empty_response_has_no_share() -> None:
    """A row without tokens gives zeros, not 0 / 0."""
    assert SequenceMean().share(torch.tensor([[False, False], [True, True]])).tolist() == [[0.0, 0.0], [0.5, 0.5]]


def test_constant_length_must_be_positive() -> None:
    """Division by zero is refused when the rule is built."""
    with pytest.raises(ValueError, match="at least 1 token, got 0"):
        ConstantLength(0)


def test_kl_estimators_by_hand() -> None:
    """With log pi - log pi_ref = log 2: log 2, log(2)^2 / 2, and 1/2 - 1 + log 2."""
    log2 = math.log(2)
    for name, want in (("k1", log2), ("k2", log2**2 / 2), ("k3", log2 - 0.5)):
        assert_close(ESTIMATORS[name](f64(-1.0), f64(-1.0 - log2)), f64(want))
        assert_close(KLPenalty(0.1, name, "reward")(f64(-1.0), f64(-1.0 - log2)), f64(want))  # type: ignore[arg-type]


@given(st.floats(-20, 0), st.floats(-20, 0))
@LAWS
def test_k2_and_k3_are_never_negative(logprob: float, ref: float) -> None:
    """Zero only where both agree; exp(x) - x - 1 may round to -2^-53 times the size of x."""
    for estimator in (k2, k3):
        assert float(estimator(f64(logprob), f64(ref))) >= -1e-14
        assert float(estimator(f64(logprob), f64(logprob))) == 0.0
        if abs(logprob - ref) > 1e-3:
            assert float(estimator(f64(logprob), f64(ref))) > 0.0


def test_expectations_of_the_estimators_and_of_their_gradients() -> None:
    """Over a vocabulary: k1 and k3 give KL(pi, ref); gradients: k1 none, k2 that of KL, k3 that of KL(ref, pi)."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(9, generator=generator, dtype=torch.float64, requires_grad=True)
    ref = torch.randn(9, generator=generator, dtype=torch.float64).log_softmax(-1)
    logp = logits.log_softmax(-1)
    kl, reverse = (logp.exp() * (logp - ref)).sum(), (ref.exp() * (ref - logp)).sum()
    p = logp.exp().detach()
    for estimator in (k1, k3):
        assert_close((p * estimator(logp, ref)).sum(), kl)
    wanted = {
        k1: torch.zeros_like(logits),
        k2: torch.autograd.grad(kl, logits, retain_graph=True)[0],
        k3: torch.autograd.grad(reverse, logits, retain_graph=True)[0],
    }
    for estimator, want in wanted.items():
        assert_close(torch.autograd.grad((p * estimator(logp, ref)).sum(), logits, retain_graph=True)[0], want)


def test_kl_penalty_refuses_what_cannot_work() -> None:
    """No distance to be paid for, and an estimator whose gradient says nothing."""
    with pytest.raises(ValueError, match=r"kl\.beta must be > 0, got 0"):
        KLPenalty(beta=0)
    with pytest.raises(ValueError, match="k1 in the loss"):
        KLPenalty(estimator="k1")


# Limit 20, buffer 4: free up to 16 tokens, then a quarter of the factor per token.
@pytest.mark.parametrize(("length", "penalty"), [(1, 0.0), (15, 0.0), (16, 0.0), (17, -0.25), (19, -0.75), (20, -1.0)])
def test_overlong_penalty_by_hand_and_trl(length: int, penalty: float) -> None:
    """At the edges of the zone, given in tokens or as a share; TRL's soft punishment is the same up to the limit."""
    lengths = torch.tensor([length])
    assert OverlongPenalty(buffer=4)(lengths, limit=20).tolist() == [penalty]
    assert OverlongPenalty(factor=0.5)(lengths, limit=20).tolist() == [penalty / 2]
    trl = trl_function("rewards/other_rewards.py", "_SoftOverlongPunishment")(20, 4)
    assert trl([[7] * length]) == [penalty]


@pytest.mark.parametrize(("share", "limit", "width"), [(0.2, 20480, 4096), (0.2, 34, 7), (0.01, 10, 1), (1.0, 8, 8)])
def test_overlong_zone_as_a_share(share: float, limit: int, width: int) -> None:
    """DAPO's own numbers, rounding, and at least one token; a buffer given in tokens wins."""
    assert OverlongPenalty(share=share).width(limit) == width
    assert OverlongPenalty(buffer=3, share=share).width(limit) == 3


@pytest.mark.parametrize("arguments", [{"buffer": 0}, {"share": 0.0}, {"share": 1.1}])
def test_overlong_zone_must_exist(arguments: dict[str, Any]) -> None:
    """An empty zone, or one longer than the response, is refused."""
    with pytest.raises(ValueError, match=rf"overlong\.{next(iter(arguments))} must"):
        OverlongPenalty(**arguments)


def test_dynamic_sampling_keeps_mixed_groups() -> None:
    """Groups 5 (all right), 2 (all wrong) and 9 (mixed), interleaved."""
    group = torch.tensor([5, 2, 9, 9, 5, 2, 9])
    correct = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0])
    assert DynamicSampling.mixed(correct, group).tolist() == [False, False, True, True, False, False, True]
    with pytest.raises(ValueError, match="max_rounds must be at least 1, got 0"):
        DynamicSampling(max_rounds=0)


@pytest.mark.parametrize("delta", [None, 3.0])
@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize(
    ("kind", "rule"),
    [("grpo", SequenceMean()), ("bnpo", TokenMean()), ("dapo", TokenMean()), ("dr_grpo", ConstantLength(10))],
)
def test_trl(kind: str, rule: Aggregation, beta: float, delta: float | None) -> None:
    """Loss, gradient and clip fractions of TRL 1.16 for each of its loss types.

    TRL's delta caps the ratio and our dual clip the objective of A < 0: the same while delta > 1 + clip_high. Its
    grpo loss divides by all rows, ours by the sum of shares, which is less by the rows that have no token.
    """
    generator = torch.Generator().manual_seed(1)
    logprobs = -torch.rand(3, 4, generator=generator, dtype=torch.float64) - 2
    shift = 1.5 * torch.randn(3, 4, generator=generator, dtype=torch.float64)
    old, ref, advantage = logprobs - shift, logprobs + 0.3 * shift.roll(1, 1), f64(1.0, -0.7, -1.3)
    inputs = {
        "prompt_ids": torch.zeros(3, 2),
        "prompt_mask": torch.ones(3, 2),
        "completion_ids": torch.zeros(3, 4),
        "completion_mask": MASK.long(),
        "advantages": advantage,
        "old_per_token_logps": old,
        "ref_per_token_logps": ref,
        "num_items_in_batch": MASK.sum(),
    }
    theirs_at = logprobs.clone().requires_grad_()
    theirs, metrics = trl_loss(theirs_at, inputs, kind, beta, delta)

    ours_at = logprobs.clone().requires_grad_()
    loss = ClippedSurrogate(0.2, 0.28, delta)
    share = rule.share(MASK).double()
    objective = loss.surrogate(ours_at - old, advantage[:, None])
    if beta:
        objective = objective - beta * KLPenalty(beta)(ours_at, ref)
    ours = -(share * objective).sum() / rule.denominator(float(share.sum()), len(MASK))
    assert_close(ours, theirs)
    assert_close(torch.autograd.grad(ours, ours_at), torch.autograd.grad(theirs, theirs_at))

    low, high = loss.clipped(ours_at.detach() - old, advantage[:, None])
    assert 0 < float(low[MASK].float().mean()) == pytest.approx(metrics["clip_ratio/low_mean"][0])
    assert 0 < float(high[MASK].float().mean()) == pytest.approx(metrics["clip_ratio/high_mean"][0])
    assert bool(((ours_at - old).exp() > 3)[MASK & (advantage[:, None] < 0)].any())  # the dual clip had work to do
