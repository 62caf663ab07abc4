"""Train on positive or on negative samples alone, or weight them."""

from __future__ import annotations

from dataclasses import replace

import torch

from lit_rlvr.credit import CreditCallback, CreditContext
from lit_rlvr.reduce import mean
from lit_rlvr.schedule import Schedule, at, ends
from lit_rlvr.types import Credit, RolloutBatch


class PositiveNegative(CreditCallback):
    """Multiply the weight of tokens with A > 0 by ``positive`` and of those with A < 0 by ``negative``.

    A side at 0 leaves the numerator and the denominator; any other factor leaves the denominator as it is. Tokens with
    A = 0 keep their share of the denominator.

    Source: the released code of Deng et al. 2025 (arXiv 2508.02260) has switches for one side only; the weights between
    are this project's own.

    Args:
        positive: Factor for A > 0, constant or scheduled.
        negative: Factor for A < 0, constant or scheduled.
        stages: Act only in these stages.
        name: Name in logs and checkpoints.

    Raises:
        ValueError: For a negative factor, or for two that are 0.
    """

    token_level = False

    def __init__(
        self,
        positive: Schedule | float = 1.0,
        negative: Schedule | float = 1.0,
        stages: list[str] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(stages, name)
        factors = (*ends(positive), *ends(negative))
        if min(factors) < 0 or not any(factors):
            raise ValueError(f"PositiveNegative needs factors >= 0, not both 0; got {positive} and {negative}")
        self.positive, self.negative = positive, negative

    def assign(self, credit: Credit, rollout: RolloutBatch, ctx: CreditContext) -> Credit:
        up, down, learns = credit.advantage > 0, credit.advantage < 0, credit.weight > 0
        positive, negative = at(self.positive, ctx), at(self.negative, ctx)
        factor = torch.ones_like(credit.weight).masked_fill(up, positive).masked_fill(down, negative)
        ctx.log("positive", mean(ctx.reduce, up[learns]))
        ctx.log("negative", mean(ctx.reduce, down[learns]))
        if isinstance(self.positive, Schedule) or isinstance(self.negative, Schedule):
            ctx.log("factor_positive", positive)
            ctx.log("factor_negative", negative)
        return replace(credit, weight=credit.weight * factor, count=credit.count.masked_fill(factor == 0, 0.0))
