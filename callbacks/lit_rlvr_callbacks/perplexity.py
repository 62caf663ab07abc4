"""Shape the advantage by how surprising a response is among the responses to the same prompt."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lit_rlvr.credit import CreditCallback, CreditContext
from lit_rlvr.reduce import mean
from lit_rlvr.types import Credit, RolloutBatch

CLAMP = (0.8, 1.2)


class PerplexityShaping(CreditCallback):
    """Multiply the advantage by clamp(1 - alpha * w, 0.8, 1.2), w the response's standardised log-perplexity.

    log PPL(o) is minus the mean old log-probability over the response, end token included. Within each prompt's group,
    mean and population deviation are taken after dropping values outside 1.5 interquartile ranges (all are kept if none
    is left); a deviation of at most 1e-6 counts as 1. A positive ``alpha`` favours low-perplexity responses, a negative
    one high-perplexity responses.

    Source: Deng et al. 2025 (arXiv 2508.02260) and its released code. With the paper's alpha of 0.01 and 8 responses
    per prompt, advantages move by at most 2.6 % unless a response is an outlier.

    Args:
        alpha: Strength.
        stages: Act only in these stages.
        name: Name in logs and checkpoints.
    """

    token_level = False

    def __init__(self, alpha: float = 0.01, stages: list[str] | None = None, name: str | None = None) -> None:
        super().__init__(stages, name)
        self.alpha = alpha

    def assign(self, credit: Credit, rollout: RolloutBatch, ctx: CreditContext) -> Credit:
        log_ppl = -(rollout.old_logprobs.double() * rollout.response_mask).sum(-1) / rollout.lengths.clamp(min=1)
        factor = (1 - self.alpha * standardise(log_ppl, rollout.group)).clamp(*CLAMP).to(credit.advantage)
        ctx.log("log_perplexity", mean(ctx.reduce, log_ppl))
        ctx.log("factor_deviation", mean(ctx.reduce, (factor - 1).abs()))
        return replace(credit, advantage=credit.advantage * factor[:, None])


def standardise(values: Tensor, group: Tensor) -> Tensor:
    """(v - mean) / deviation of each row [B] within its group [B], outliers left out of mean and deviation."""
    scores = torch.zeros_like(values, dtype=torch.float64)
    for number in group.unique():
        rows = group == number
        members = values[rows].double()
        low, high = torch.quantile(members, torch.tensor([0.25, 0.75]).to(members))
        reach = 1.5 * (high - low)
        inliers = members[(members >= low - reach) & (members <= high + reach)]
        inliers = members if len(inliers) == 0 else inliers
        deviation = inliers.std(correction=0)
        scores[rows] = (members - inliers.mean()) / torch.where(deviation > 1e-6, deviation, 1.0)
    return scores
