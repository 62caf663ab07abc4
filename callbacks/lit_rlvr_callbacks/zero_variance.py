"""Learn from prompts whose responses are all right or all wrong."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from lit_rlvr.credit import CreditCallback, CreditContext
from lit_rlvr.reduce import mean
from lit_rlvr.schedule import Schedule, at, ends
from lit_rlvr.types import Credit, RolloutBatch

if TYPE_CHECKING:
    from lit_rlvr.module import RLVRModule


class ZeroVariance(CreditCallback):
    """In groups whose rewards are all equal, A <- alpha * H if all are right, -alpha * (max H - H) if all are wrong.

    H is the token's entropy and max H the largest in its response, as constants; other groups keep their advantage.

    Source: RL-ZVP, Le et al. 2025 (arXiv 2509.21880), Eq. 5, where alpha .1 and .2 do best. Its H is the current
    policy's in each update: ``scope: mini_batch``, which costs a scoring pass. The default takes that of the policy
    that the phase began with, which is the same in the phase's first update.

    Args:
        alpha: Strength, constant or scheduled.
        scope: ``phase`` or ``mini_batch``: whose entropy.
        stages: Act only in these stages.
        name: Name in logs and checkpoints.

    Raises:
        ValueError: For a negative ``alpha``, or another ``scope``.
    """

    def __init__(
        self,
        alpha: Schedule | float = 0.1,
        scope: Literal["phase", "mini_batch"] = "phase",
        stages: list[str] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(stages, name)
        if min(ends(alpha)) < 0:
            raise ValueError(f"ZeroVariance.alpha must be >= 0, got {alpha}")
        if scope not in ("phase", "mini_batch"):
            raise ValueError(f"ZeroVariance.scope must be phase or mini_batch, which hold whole groups; got {scope!r}")
        self.alpha, self.scope, self.reads_current = alpha, scope, scope != "phase"

    def check(self, module: RLVRModule) -> None:
        if module.dynamic_sampling is not None:
            raise ValueError(
                f"{self.state_key} learns from groups that are all right or all wrong, and dynamic_sampling drops "
                "them; set dynamic_sampling: null"
            )
        if module.kl is not None and module.kl.where == "reward":
            raise ValueError(
                f"{self.state_key} acts on groups whose rewards are all equal, and with kl.where: reward none are; use "
                "kl.where: loss"
            )

    def assign(self, credit: Credit, rollout: RolloutBatch, ctx: CreditContext) -> Credit:
        mask = rollout.response_mask
        entropies = (rollout.entropies if ctx.current is None else ctx.current.entropies).to(credit.advantage) * mask
        flat = all_equal(rollout.rewards, rollout.group) & all_equal(rollout.correct, rollout.group)
        right, wrong = flat & (rollout.correct > 0), flat & (rollout.correct <= 0)
        alpha = at(self.alpha, ctx)
        up, down = alpha * entropies, -alpha * (entropies.amax(-1, keepdim=True) - entropies)
        advantage = torch.where((right[:, None] & mask), up, credit.advantage)
        advantage = torch.where((wrong[:, None] & mask), down, advantage)
        if isinstance(self.alpha, Schedule):
            ctx.log("alpha", alpha)
        ctx.log("right", mean(ctx.reduce, right))
        ctx.log("wrong", mean(ctx.reduce, wrong))
        ctx.log("advantage", mean(ctx.reduce, advantage.abs(), flat[:, None] & mask))
        return replace(credit, advantage=advantage)


def all_equal(values: Tensor, group: Tensor) -> Tensor:
    """Whether all ``values`` [B] of a row's group [B] are equal; bool [B]."""
    equal = torch.zeros_like(group, dtype=torch.bool)
    for number in group.unique():
        members = values[group == number]
        equal[group == number] = bool((members == members[0]).all())
    return equal
