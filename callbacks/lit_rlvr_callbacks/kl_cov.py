"""KL-Cov: hold at the old policy the few tokens that would lower the entropy most."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from lit_rlvr.credit import CreditContext
from lit_rlvr.reduce import mean
from lit_rlvr.schedule import Schedule, at, ends
from lit_rlvr.selection import sortable, top_k
from lit_rlvr.types import Credit, RolloutBatch
from lit_rlvr_callbacks.covariance import CovarianceCallback, covariance


class KLCov(CovarianceCallback):
    """Add coefficient * |log(pi / pi_old)| to the loss of the floor(ratio * n) tokens with the largest covariance.

    A token's covariance is (A - mean A)(log pi - mean log pi) under the current policy, and n and both means are over
    the tokens that learn. As in the authors' code at least one token is held. The penalty is part of the token's share
    in the average; in a phase's first optimiser step pi is pi_old, and its gradient is 0.

    Source: Cui et al. 2025 (arXiv 2505.22617) and its code, where the default ``ratio`` is for 7B models
    and 2e-4 for 32B. The code chooses per micro-batch on each rank: ``scope: micro_batch``. With ``mini_batch``
    gradients do not depend on the micro-batch size; after a phase's first optimiser step that costs a scoring pass. The
    code also trains every token without ratio clipping; for that set
    ``model.loss: {class_path: ClippedSurrogate, init_args: {clip_low: 1.0, clip_high: 1000000.0}}``.

    Args:
        ratio: Fraction of the tokens to hold: a fraction, not percent.
        coefficient: Strength of the penalty, constant or scheduled.
        scope: Choose among all tokens of an optimiser step, or per ``micro_batch``.
        stages: Act only in these stages.
        name: Name in logs and checkpoints.

    Raises:
        ValueError: For a ``ratio`` outside [0, 1], or a negative ``coefficient``.
    """

    def __init__(
        self,
        ratio: float = 2e-3,
        coefficient: Schedule | float = 1.0,
        scope: Literal["mini_batch", "micro_batch"] = "mini_batch",
        stages: list[str] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(ratio, scope, stages, name)
        if min(ends(coefficient)) < 0:
            raise ValueError(f"KLCov.coefficient must be >= 0, got {coefficient}")
        self.coefficient = coefficient

    def assign(self, credit: Credit, rollout: RolloutBatch, ctx: CreditContext) -> Credit:
        assert ctx.current is not None
        reduce, eligible = self.reduction(ctx), credit.weight > 0
        value = covariance(credit, ctx.current.logprobs, eligible, reduce)
        earlier_first = (1 << 63) - 1 - rollout.token_order()
        held = top_k([sortable(value), earlier_first], eligible, self.wanted(eligible, reduce), reduce)
        ctx.log("held_fraction", mean(ctx.reduce, held[eligible]))
        ctx.log("covariance", mean(ctx.reduce, value, eligible))
        ctx.log("covariance_held", mean(ctx.reduce, value, held))
        if isinstance(self.coefficient, Schedule):
            ctx.log("coefficient", at(self.coefficient, ctx))
        coefficient = at(self.coefficient, ctx) * held * credit.count
        if not coefficient.any() and credit.kl_coef is None:
            return credit
        return replace(credit, kl_coef=coefficient if credit.kl_coef is None else credit.kl_coef + coefficient)
