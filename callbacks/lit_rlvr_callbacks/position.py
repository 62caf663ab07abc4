"""Shape the advantage by position: what stands near the end of a response learns more."""

from __future__ import annotations

from dataclasses import replace

import torch

from lit_rlvr.credit import CreditCallback, CreditContext
from lit_rlvr.reduce import extremes, mean
from lit_rlvr.schedule import Schedule, at, ends
from lit_rlvr.types import Credit, RolloutBatch


class PositionShaping(CreditCallback):
    """A <- A + sign(A) * min(gamma * sigmoid(slope * (r - centre)), cap * |A|), with r = (t - 1) / L in [0, 1).

    Tokens with A = 0 stay as they are. The paper applies it only at the start of the plateau, for 200 < step < 300. Its
    steps are rollout phases and count from 1, those here from 0: use ``first_step: 200, last_step: 298``, or ``stages:
    [plateau]`` with a stage detector.

    Source: Deng et al. 2025 (arXiv 2508.02260) and its released code.

    Args:
        gamma: Largest bonus; a number, or a schedule over rollout phases or by stage.
        slope: Steepness k of the sigmoid.
        centre: Relative position at which the bonus is half of ``gamma``.
        cap: Largest bonus as a share of the advantage.
        first_step: First rollout phase to act in; phases count from 0.
        last_step: Last rollout phase to act in; null: no end.
        stages: Act only in these stages.
        name: Name in logs and checkpoints.

    Raises:
        ValueError: For a negative ``gamma`` or ``cap``, or an empty window.
    """

    def __init__(
        self,
        gamma: Schedule | float = 0.1,
        slope: float = 15.0,
        centre: float = 0.5,
        cap: float = 0.5,
        first_step: int = 0,
        last_step: int | None = None,
        stages: list[str] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(stages, name)
        if bad := [value for value in ends(gamma) if not value >= 0]:
            raise ValueError(f"PositionShaping.gamma must be >= 0, got {bad[0]}")
        if not cap >= 0:
            raise ValueError(f"PositionShaping.cap must be >= 0, got {cap}")
        if last_step is not None and last_step < first_step:
            raise ValueError(f"PositionShaping acts from step {first_step} to {last_step}: that window is empty")
        self.gamma, self.slope, self.centre, self.cap = gamma, slope, centre, cap
        self.first_step, self.last_step = first_step, last_step

    def assign(self, credit: Credit, rollout: RolloutBatch, ctx: CreditContext) -> Credit:
        if ctx.step < self.first_step or (self.last_step is not None and ctx.step > self.last_step):
            return credit
        advantage, mask = credit.advantage, rollout.response_mask
        position = torch.arange(mask.shape[1], device=mask.device)[None, :] / rollout.lengths.clamp(min=1)[:, None]
        gamma = at(self.gamma, ctx)
        bonus = gamma * torch.sigmoid(self.slope * (position - self.centre))
        bonus = torch.minimum(bonus, self.cap * advantage.abs()) * mask
        smallest, largest = extremes(ctx.reduce, 1 + bonus / advantage.abs(), mask & (advantage != 0))
        ctx.log("bonus", mean(ctx.reduce, bonus, mask))
        ctx.log("factor_min", smallest)
        ctx.log("factor_max", largest)
        if isinstance(self.gamma, Schedule):
            ctx.log("gamma", gamma)
        return replace(credit, advantage=advantage + advantage.sign() * bonus)
