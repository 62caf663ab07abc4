"""GSPO and CISPO: hand-computed numbers, laws and TRL."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import tiny_module
from torch import Tensor
from torch.testing import assert_close
from trl_source import trl_loss

from lit_rlvr.aggregation import SequenceMean, TokenMean
from lit_rlvr.losses import CISPO, GSPO, PolicyLoss

LAWS = settings(max_examples=40, deadline=None, derandomize=True)
MASK = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]], dtype=torch.bool)
ROW = MASK.nonzero()[:, 0]
ADVANTAGE = torch.tensor([1.0, -0.7, -1.3], dtype=torch.float64)


def inputs(old: Tensor) -> dict[str, Tensor]:
    """A batch as TRL reads it."""
    return {
        "prompt_ids": torch.zeros(3, 2),
        "prompt_mask": torch.ones(3, 2),
        "completion_ids": torch.zeros(3, 4),
        "completion_mask": MASK.long(),
        "advantages": ADVANTAGE,
        "old_per_token_logps": old,
        "num_items_in_batch": MASK.sum(),
    }


def some_logprobs(size: float) -> tuple[Tensor, Tensor]:
    """New and old log-probabilities [3, 4], about ``size`` apart."""
    generator = torch.Generator().manual_seed(1)
    logprobs = -torch.rand(3, 4, generator=generator, dtype=torch.float64) - 2
    return logprobs, logprobs - size * torch.randn(3, 4, generator=generator, dtype=torch.float64)


def our_loss(loss: PolicyLoss, rule: Any, logprobs: Tensor, old: Tensor) -> Tensor:
    """The loss over the masked tokens, as the loop takes it."""
    share = rule.share(MASK)[MASK].double()
    entering = loss.entering((logprobs - old)[MASK], ROW)
    total = (share * loss.surrogate(entering, ADVANTAGE[ROW])).sum()
    return -total / rule.denominator(float(share.sum()), len(MASK))


@pytest.mark.parametrize("size", [1e-4, 0.3])
def test_gspo_against_trl(size: float) -> None:
    """Loss and gradient of ``importance_sampling_level="sequence"`` with the grpo loss, inside and outside the clip."""
    logprobs, old = some_logprobs(size)
    bounds = {"epsilon_low": 3e-4, "epsilon_high": 4e-4, "importance_sampling_level": "sequence"}
    theirs_at, ours_at = (logprobs.clone().requires_grad_() for _ in range(2))
    theirs, _ = trl_loss(theirs_at, inputs(old), "grpo", 0.0, None, **bounds)
    ours = our_loss(GSPO(), SequenceMean(), ours_at, old)
    assert_close(ours, theirs)
    slopes = torch.autograd.grad(ours, ours_at)[0]
    assert_close(slopes, torch.autograd.grad(theirs, theirs_at)[0])
    assert bool((slopes != 0).any()) or size > 0.1


def test_cispo_against_trl() -> None:
    """The gradient; the value differs by the tokens' old log-probabilities, each with its weight."""
    logprobs, old = some_logprobs(1.5)
    theirs_at, ours_at = (logprobs.clone().requires_grad_() for _ in range(2))
    theirs, metrics = trl_loss(theirs_at, inputs(old), "cispo", 0.0, None, epsilon_high=0.8)
    ours = our_loss(CISPO(cap=0.8), TokenMean(), ours_at, old)
    assert_close(torch.autograd.grad(ours, ours_at)[0], torch.autograd.grad(theirs, theirs_at)[0])
    weight = (logprobs - old).exp().clamp(max=0.8) * ADVANTAGE[:, None]
    assert_close(ours.detach() - (weight * old)[MASK].sum() / MASK.sum(), theirs.detach())
    _, capped = CISPO(cap=0.8).clipped((logprobs - old)[MASK], ADVANTAGE[ROW])
    counted = capped & (ADVANTAGE[ROW] > 0)
    assert 0 < float(counted.float().mean()) == pytest.approx(metrics["cispo_clip_ratio"][0])


def test_gspo_by_hand() -> None:
    """Log-ratios .3 and .1 make a ratio of e^.2 for both; clipped at 1.1 where A > 0, not where A < 0."""
    loss, x = GSPO(0.1, 0.1), torch.tensor([0.3, 0.1, -0.2], dtype=torch.float64)
    entering = loss.entering(x, torch.tensor([4, 4, 9]))
    assert_close(entering, torch.tensor([0.2, 0.2, -0.2], dtype=torch.float64))
    values = loss.surrogate(entering, torch.tensor([2.0, -2.0, -1.0], dtype=torch.float64))
    assert_close(values, torch.tensor([2.2, -2 * math.exp(0.2), -0.9], dtype=torch.float64))
    assert [t.tolist() for t in loss.clipped(entering, torch.tensor([2.0, -2.0, -1.0]))] == [
        [False, False, True],
        [True, False, False],
    ]


@LAWS
@given(st.lists(st.tuples(st.floats(-0.5, 0.5), st.integers(0, 2)), min_size=1, max_size=9), st.randoms())
def test_gspo_laws(tokens: list[tuple[float, int]], rng: Any) -> None:
    """Both levels have one value; order of tokens is nothing; equal advantages give one gradient in sum."""
    x = torch.tensor([t for t, _ in tokens], dtype=torch.float64)
    row = torch.tensor([r for _, r in tokens])
    sequence, token = GSPO(0.2, 0.2), GSPO(0.2, 0.2, level="token")
    assert_close(sequence.entering(x, row), token.entering(x, row))
    order = torch.tensor(rng.sample(range(len(x)), len(x)))
    assert_close(sequence.entering(x[order], row[order]), sequence.entering(x, row)[order])
    slopes = []
    for loss in (sequence, token):
        at = x.clone().requires_grad_()
        objective = loss.surrogate(loss.entering(at, row), torch.ones_like(at))
        slopes.append(torch.autograd.grad(objective.sum(), at)[0])
    for number in row.unique():
        assert_close(slopes[0][row == number].sum(), slopes[1][row == number].sum())


def test_gspo_of_nothing() -> None:
    """An empty micro-batch has no tokens."""
    nothing = torch.zeros(0, dtype=torch.float64)
    assert GSPO().entering(nothing, torch.zeros(0, dtype=torch.int64)).shape == (0,)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GSPO(level="word"), "level must be sequence or token"),  # type: ignore[arg-type]
        (lambda: GSPO(clip_low=-1.0), "clip_low must lie in"),
        (lambda: CISPO(cap=0.0), "largest ratio itself and must be > 0"),
    ],
)
def test_wrong_settings_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_which_losses_need_whole_responses() -> None:
    """The loop asks for it: such a loss cannot go through the head in chunks."""
    module = tiny_module(loss=GSPO(level="token"))
    assert module.loss.whole_responses
    assert not module.loss.sequence_level
    assert GSPO().sequence_level
    assert not CISPO().whole_responses
