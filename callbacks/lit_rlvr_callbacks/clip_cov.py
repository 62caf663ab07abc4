"""Clip-Cov: take out of the update a few tokens that would lower the entropy most."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from lit_rlvr.credit import CreditContext
from lit_rlvr.hashing import hash_integers
from lit_rlvr.losses import PolicyLoss
from lit_rlvr.reduce import mean
from lit_rlvr.selection import top_k
from lit_rlvr.types import Credit, RolloutBatch
from lit_rlvr_callbacks.covariance import CovarianceCallback, covariance

if TYPE_CHECKING:
    from lit_rlvr.module import RLVRModule


class ClipCov(CovarianceCallback):
    """Give weight 0 to floor(ratio * n) random tokens with low < covariance < high; they stay in the denominator.

    A token's covariance is (A - mean A)(log pi - mean log pi) under the current policy, and n and both means are over
    the tokens that learn. As in the authors' code at least one token is drawn where there are candidates, and tokens
    that the loss clips already are none. Which are drawn is a hash of seed, update and token.

    Source: Cui et al. 2025 (arXiv 2505.22617) and its code. The code draws per micro-batch on each rank:
    ``scope: micro_batch``. With ``mini_batch`` gradients do not depend on the micro-batch size; after a phase's first
    optimiser step that costs a scoring pass.

    Args:
        ratio: Fraction of the tokens to take out: a fraction, not percent.
        low: Lower bound of the covariance.
        high: Upper bound of the covariance.
        scope: Choose among all tokens of an optimiser step, or per ``micro_batch``.
        stages: Act only in these stages.
        name: Name in logs and checkpoints.

    Raises:
        ValueError: For a ``ratio`` outside [0, 1], or bounds that leave nothing between them.
    """

    def __init__(
        self,
        ratio: float = 2e-4,
        low: float = 1.0,
        high: float = 5.0,
        scope: Literal["mini_batch", "micro_batch"] = "mini_batch",
        stages: list[str] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(ratio, scope, stages, name)
        if low >= high:
            raise ValueError(f"ClipCov takes tokens with low < covariance < high, got {low} and {high}")
        self.low, self.high = low, high
        self.loss: PolicyLoss | None = None

    def check(self, module: RLVRModule) -> None:
        """Remember the loss, which knows the tokens that it clips."""
        self.loss = module.loss

    def assign(self, credit: Credit, rollout: RolloutBatch, ctx: CreditContext) -> Credit:
        assert ctx.current is not None
        reduce, eligible = self.reduction(ctx), credit.weight > 0
        value = covariance(credit, ctx.current.logprobs, eligible, reduce)
        candidates = eligible & (value > self.low) & (value < self.high) & ~self._clipped(credit, rollout, ctx)
        number = min(self.wanted(eligible, reduce), int(reduce.sum(candidates.sum())))
        token = rollout.token_order()
        lot = hash_integers(ctx.seed, ctx.update, rollout.uid[:, :1], token) & ((1 << 63) - 1)
        dropped = top_k([lot, token], candidates, number, reduce)
        ctx.log("candidates", mean(ctx.reduce, candidates[eligible]))
        ctx.log("dropped_fraction", mean(ctx.reduce, dropped[eligible]))
        ctx.log("covariance", mean(ctx.reduce, value, eligible))
        return replace(credit, weight=credit.weight.masked_fill(dropped, 0.0))

    def _clipped(self, credit: Credit, rollout: RolloutBatch, ctx: CreditContext) -> Tensor:
        """Tokens that the loss's own clip holds back [B, T]."""
        mask = rollout.response_mask
        held = torch.zeros_like(mask)
        if self.loss is not None and ctx.current is not None:
            log_ratio = (ctx.current.logprobs - rollout.old_logprobs)[mask]
            entering = self.loss.entering(log_ratio, mask.nonzero()[:, 0])
            low, high = self.loss.clipped(entering, credit.advantage[mask])
            held[mask] = low | high
        return held
