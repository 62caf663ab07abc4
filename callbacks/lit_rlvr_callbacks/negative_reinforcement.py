"""Reinforce right answers, suppress wrong ones, or weight the two."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lit_rlvr.advantages import Raw
from lit_rlvr.credit import CreditCallback, CreditContext
from lit_rlvr.reduce import mean
from lit_rlvr.types import RolloutBatch

if TYPE_CHECKING:
    from lit_rlvr.module import RLVRModule


class NegativeReinforcement(CreditCallback):
    """Reward a right response with ``right`` and a wrong one with ``wrong``, whatever the task's own reward.

    1 and 0 is PSR (positive samples only), 0 and -1 is NSR (negative samples only), 0.1 and -1 is W-REINFORCE. What
    callbacks before it added to the rewards stays.

    It needs ``advantage: Raw``: with a baseline all three maps give the same advantages. It needs every group, too:
    dynamic sampling would drop the all-wrong ones, which NSR learns most from.

    Source: Zhu et al. 2025 (arXiv 2506.01347), with lambda .1.

    Args:
        right: Reward of a right response, >= 0; the paper's lambda.
        wrong: Reward of a wrong response, <= 0.
        stages: Act only in these stages.
        name: Name in logs and checkpoints.

    Raises:
        ValueError: For a reward of the wrong sign, or two that are 0.
    """

    token_level = False

    def __init__(
        self, right: float = 0.1, wrong: float = -1.0, stages: list[str] | None = None, name: str | None = None
    ) -> None:
        super().__init__(stages, name)
        if right < 0 or wrong > 0 or right == wrong:
            raise ValueError(f"NegativeReinforcement needs right >= 0 >= wrong, not both 0; got {right} and {wrong}")
        self.right, self.wrong = right, wrong

    def check(self, module: RLVRModule) -> None:
        if not isinstance(module.advantage, Raw):
            raise ValueError(
                f"{self.state_key} changes nothing under advantage {type(module.advantage).__name__}, whose baseline "
                "takes the reward map out again; use advantage: Raw"
            )
        if module.dynamic_sampling is not None:
            raise ValueError(
                f"{self.state_key} learns from groups that are all right or all wrong too, and dynamic_sampling drops "
                "them; set dynamic_sampling: null"
            )

    def shape_rewards(self, rollout: RolloutBatch, rewards: Tensor, ctx: CreditContext) -> Tensor:
        right = rollout.correct > 0
        ctx.log("right", mean(ctx.reduce, right))
        mapped = torch.where(right, self.right, self.wrong).to(rewards)
        return mapped + (rewards - rollout.rewards)
