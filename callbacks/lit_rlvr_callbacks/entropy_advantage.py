"""Raise the advantage where the policy is undecided."""

from __future__ import annotations

from dataclasses import replace

import torch

from lit_rlvr.credit import CreditCallback, CreditContext, Scope
from lit_rlvr.reduce import mean
from lit_rlvr.schedule import Schedule, at, ends
from lit_rlvr.types import Credit, RolloutBatch


class EntropyAdvantage(CreditCallback):
    """A <- A + min(alpha * H, |A| / kappa), with the entropy H as a constant.

    The cap keeps the sign of the advantage. Tokens with A = 0 stay as they are.

    Source: Cheng et al. 2025 (arXiv 2506.14758), with alpha .4 for GRPO and .1 for PPO. Its H is the current policy's
    in each update: ``scope: mini_batch`` takes it from a scoring pass, ``scope: micro_batch`` from the training forward
    (the same numbers, but ``batch.micro_rows`` must be set). The default takes that of the policy that the phase began
    with, which costs nothing and is the same in the phase's first update.

    Args:
        alpha: Strength, constant or scheduled.
        kappa: The bonus is at most |A| / kappa; above 1.
        scope: ``phase``, ``mini_batch`` or ``micro_batch``: whose entropy.
        stages: Act only in these stages.
        name: Name in logs and checkpoints.

    Raises:
        ValueError: For a negative ``alpha``, a ``kappa`` that could turn signs, or an unknown ``scope``.
    """

    def __init__(
        self,
        alpha: Schedule | float = 0.4,
        kappa: float = 2.0,
        scope: Scope = "phase",
        stages: list[str] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(stages, name)
        if min(ends(alpha)) < 0 or kappa <= 1:
            raise ValueError(f"EntropyAdvantage needs alpha >= 0 and kappa > 1, got {alpha} and {kappa}")
        if scope not in ("phase", "mini_batch", "micro_batch"):
            raise ValueError(f"EntropyAdvantage.scope must be phase, mini_batch or micro_batch, got {scope!r}")
        self.alpha, self.kappa, self.scope, self.reads_current = alpha, kappa, scope, scope != "phase"

    def assign(self, credit: Credit, rollout: RolloutBatch, ctx: CreditContext) -> Credit:
        entropies = rollout.entropies if ctx.current is None else ctx.current.entropies
        advantage, mask = credit.advantage, rollout.response_mask
        free, cap = at(self.alpha, ctx) * entropies.to(advantage), advantage.abs() / self.kappa
        bonus = torch.minimum(free, cap) * mask
        if isinstance(self.alpha, Schedule):
            ctx.log("alpha", at(self.alpha, ctx))
        ctx.log("bonus", mean(ctx.reduce, bonus, mask))
        ctx.log("capped", mean(ctx.reduce, free > cap, mask & (advantage != 0)))
        return replace(credit, advantage=advantage + bonus)
