"""MaskTruncated: who learns, and TRL's loss with ``mask_truncated_completions``."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from lit_rlvr_callbacks import MaskTruncated
from rollouts import build_rollout, full_credit
from torch.testing import assert_close
from trl_source import trl_loss

from lit_rlvr.aggregation import Aggregation, ConstantLength, SequenceMean, TokenMean
from lit_rlvr.credit import CreditContext, assign_credit
from lit_rlvr.losses import ClippedSurrogate

ROLLOUT = replace(build_rollout([[0.1, 0.2, 0.3], [0.4], [0.5, 0.6]]), truncated=torch.tensor([True, False, False]))


def test_what_was_cut_off_has_no_weight_and_no_count() -> None:
    """By hand: the first of three responses. Advantages stay, and so does what others hold at the old policy."""
    credit = full_credit(ROLLOUT)
    credit = replace(credit, kl_coef=2 * credit.weight)
    ctx = CreditContext()
    after = assign_credit([MaskTruncated()], ROLLOUT, credit, ctx)
    kept = [[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [1.0, 1.0, 0.0]]
    assert after.weight.tolist() == kept
    assert after.count.tolist() == kept
    assert after.kl_coef is not None
    assert after.kl_coef.tolist() == [[2 * x for x in row] for row in kept]
    assert torch.equal(after.advantage, credit.advantage)
    assert ctx.metrics == {"credit/MaskTruncated/masked": pytest.approx(1 / 3)}


def test_nothing_changes_where_nothing_was_cut_off() -> None:
    whole, credit = replace(ROLLOUT, truncated=torch.zeros(3, dtype=torch.bool)), full_credit(ROLLOUT)
    after = assign_credit([MaskTruncated()], whole, credit, CreditContext())
    assert torch.equal(after.weight, credit.weight)
    assert torch.equal(after.count, credit.count)
    assert after.kl_coef is None


@pytest.mark.parametrize(
    ("kind", "rule", "of_theirs"),
    [
        ("dapo", TokenMean(), 1.0),
        ("bnpo", TokenMean(), 1.0),
        ("grpo", SequenceMean(), 2 / 3),
        ("dr_grpo", ConstantLength(10), 1.0),
    ],
)
def test_trl(kind: str, rule: Aggregation, of_theirs: float) -> None:
    """Value and gradient of TRL's loss on the mask that it makes of truncated completions.

    Its ``grpo`` divides the two responses that are left by three; the other kinds divide as here.
    """
    mask, generator = ROLLOUT.response_mask, torch.Generator().manual_seed(1)
    old, noise = (torch.rand(mask.shape, generator=generator).double() for _ in range(2))
    logprobs, advantage = old + noise - 0.5, torch.tensor([1.0, -0.7, 1.3]).double()
    masked = mask.int() * (~ROLLOUT.truncated).unsqueeze(1).int()
    inputs = {
        "prompt_ids": ROLLOUT.prompt_ids, "prompt_mask": ROLLOUT.prompt_mask, "completion_ids": ROLLOUT.response_ids,
        "completion_mask": masked, "advantages": advantage, "old_per_token_logps": old,
        "num_items_in_batch": masked.sum(),
    }  # fmt: skip
    theirs_at, ours_at = (logprobs.clone().requires_grad_() for _ in range(2))
    theirs, _ = trl_loss(theirs_at, inputs, kind, 0.0, None)
    share = rule.share(mask)
    before = replace(full_credit(ROLLOUT), weight=share, count=share.clone())
    credit = assign_credit([MaskTruncated()], ROLLOUT, before, CreditContext())
    surrogate = ClippedSurrogate(0.2, 0.28).surrogate(ours_at - old, advantage[:, None])
    denominator = rule.denominator(float(credit.count.sum()), len(mask))
    ours = of_theirs * -(credit.weight.double() * surrogate).sum() / denominator
    assert_close(ours, theirs)
    assert_close(torch.autograd.grad(ours, ours_at), torch.autograd.grad(theirs, theirs_at))
