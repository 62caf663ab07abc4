"""Shape the advantage by how surprising a response is among the responses to the same prompt."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from lit_rlvr.credit import CreditCallback, CreditContext
from lit_rlvr.reduce import extremes, mean
from lit_rlvr.schedule import Schedule, at, ends
from lit_rlvr.types import Credit, RolloutBatch

CLAMP = (0.8, 1.2)


class PerplexityShaping(CreditCallback):
    """Multiply the advantage by clamp(1 - alpha * w, 0.8, 1.2), w the response's standardised log-perplexity.

    log PPL(o) is minus the mean old log-probability over the response, end token included. Within each prompt's group,
    mean and population deviation are taken after dropping values outside 1.5 interquartile ranges (all are kept if none
    is left); a deviation of at most 1e-6 counts as 1. ``favour: high`` turns it round: 1 + alpha * w.

    Source: Deng et al. 2025 (arXiv 2508.02260) and its released code. With the paper's alpha of 0.01 and 8 responses
    per prompt, advantages move by at most 2.6 % unless a response is an outlier.

    Args:
        alpha: Strength, at least 0; a number, or a schedule over rollout phases or by stage.
        favour: Which responses learn more: those of ``low`` or of ``high`` perplexity.
        stages: Act only in these stages.
        name: Name in logs and checkpoints.

    Raises:
        ValueError: For a negative ``alpha``, or an unknown direction.
    """

    token_level = False

    def __init__(
        self,
        alpha: Schedule | float = 0.01,
        favour: Literal["low", "high"] = "low",
        stages: list[str] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(stages, name)
        if bad := [value for value in ends(alpha) if not value >= 0]:
            raise ValueError(f"PerplexityShaping.alpha must be >= 0, got {bad[0]}; favour: high turns it round")
        if favour not in ("low", "high"):
            raise ValueError(f"PerplexityShaping.favour must be low or high, got {favour!r}")
        self.alpha, self.favour = alpha, favour

    def assign(self, credit: Credit, rollout: RolloutBatch, ctx: CreditContext) -> Credit:
        log_ppl = -(rollout.old_logprobs.double() * rollout.response_mask).sum(-1) / rollout.lengths.clamp(min=1)
        alpha = at(self.alpha, ctx)
        slope = -alpha if self.favour == "low" else alpha
        factor = (1 + slope * standardise(log_ppl, rollout.group)).clamp(*CLAMP).to(credit.advantage)
        smallest, largest = extremes(ctx.reduce, factor)
        ctx.log("log_perplexity", mean(ctx.reduce, log_ppl))
        ctx.log("factor_deviation", mean(ctx.reduce, (factor - 1).abs()))
        ctx.log("factor_min", smallest)
        ctx.log("factor_max", largest)
        if isinstance(self.alpha, Schedule):
            ctx.log("alpha", alpha)
        return replace(credit, advantage=credit.advantage * factor[:, None])


def standardise(values: Tensor, group: Tensor) -> Tensor:
    """(v - mean) / deviation of each row [B] within its group [B], outliers left out of mean and deviation."""
    if not len(values):
        return values.double()
    _, number, size = group.unique(return_inverse=True, return_counts=True)
    order = number.argsort(stable=True)
    row = number[order]
    column = torch.arange(len(row), device=row.device) - (size.cumsum(0) - size)[row]
    table = torch.full((len(size), int(size.max())), torch.nan, dtype=torch.float64, device=values.device)
    table[row, column] = values[order].double()  # a group in each row, filled up with NaN
    low, high = table.nanquantile(torch.tensor([0.25, 0.75]).to(table), dim=1, keepdim=True)
    reach = 1.5 * (high - low)
    inlier = (table >= low - reach) & (table <= high + reach)
    inliers = torch.where(inlier | ~inlier.any(1, keepdim=True), table, torch.nan)
    centre = inliers.nanmean(1, keepdim=True)
    deviation = (inliers - centre).square().nanmean(1, keepdim=True).sqrt()
    scores = table.new_empty(len(row))
    scores[order] = ((table - centre) / torch.where(deviation > 1e-6, deviation, 1.0))[row, column]
    return scores
