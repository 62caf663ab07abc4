"""Responses that the length limit cut off learn nothing."""

from __future__ import annotations

from dataclasses import replace

from lit_rlvr.credit import CreditCallback, CreditContext
from lit_rlvr.reduce import mean
from lit_rlvr.types import Credit, RolloutBatch


class MaskTruncated(CreditCallback):
    """Take responses that were cut off at the length limit out of the loss: out of its numerator and its denominator.

    Their reward is about an answer that they never came to. They still count in the baseline of their group, where an
    overlong penalty (``model.overlong``) is part of it. A KL penalty in the loss, other callbacks' penalties and the
    loss of a critic stay about every response token.

    Source: overlong filtering, DAPO, Yu et al. 2025 (arXiv 2503.14476), section 3.4; TRL's
    ``mask_truncated_completions``, whose loss type ``grpo`` alone still divides by the responses that it leaves out.

    Args:
        stages: Act only in these stages.
        name: Name in logs and checkpoints.
    """

    token_level = False

    def assign(self, credit: Credit, rollout: RolloutBatch, ctx: CreditContext) -> Credit:
        out = rollout.truncated[:, None]
        ctx.log("masked", mean(ctx.reduce, rollout.truncated))
        held = None if credit.kl_coef is None else credit.kl_coef.masked_fill(out, 0.0)
        return replace(
            credit, weight=credit.weight.masked_fill(out, 0.0), count=credit.count.masked_fill(out, 0.0), kl_coef=held
        )
