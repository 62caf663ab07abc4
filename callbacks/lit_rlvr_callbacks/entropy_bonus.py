"""Reward entropy in the loss, always or while it is below a target."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lit_rlvr.credit import CreditCallback, CreditContext
from lit_rlvr.reduce import mean
from lit_rlvr.schedule import Schedule, at, ends
from lit_rlvr.types import Credit, RolloutBatch, Tokens


class EntropyBonus(CreditCallback):
    """Subtract c * H from the loss of every response token, averaged by the algorithm's own rule.

    With a ``target`` the coefficient adapts: in phase k, H_k the mean entropy of the rollout, the loss gets
    c_k * 1[H_k <= target], and c_{k+1} = c_k + delta if H_k <= target, else c_k - delta, kept within [0, ``largest``].

    Source: Skywork-OR1, He et al. 2025 (arXiv 2505.22312), with a target of .2 nats and a delta of .005; ``largest`` is
    TRL's.

    Args:
        coefficient: c, constant or scheduled; with a ``target`` the constant to begin with.
        target: Entropy in nats below which it acts; null: always act, and do not adapt.
        delta: Change of c per rollout phase.
        largest: Upper bound of c.
        stages: Act only in these stages; the coefficient adapts in all of them.
        name: Name in logs and checkpoints.

    Raises:
        ValueError: For a negative number, or a schedule together with a target.
    """

    token_level = False

    def __init__(
        self,
        coefficient: Schedule | float = 0.001,
        target: float | None = None,
        delta: float = 0.005,
        largest: float = 1.0,
        stages: list[str] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(stages, name)
        if target is not None and isinstance(coefficient, Schedule):
            raise ValueError("EntropyBonus.coefficient is either scheduled or adapted to a target, not both")
        if min(ends(coefficient)) < 0 or delta < 0:
            raise ValueError(f"EntropyBonus.coefficient and delta must be >= 0, got {coefficient} and {delta}")
        self.coefficient, self.target, self.delta, self.largest = coefficient, target, delta, largest
        self._next, self._applied = ends(coefficient)[0], 0.0

    def observe(self, rollout: RolloutBatch, ctx: CreditContext) -> None:
        # Without response tokens, where dynamic sampling kept nothing, there is no entropy to look at.
        if self.target is not None and float(ctx.reduce.sum(rollout.response_mask.sum())):
            low = mean(ctx.reduce, rollout.entropies, rollout.response_mask) <= self.target
            self._applied = self._next if low else 0.0
            self._next = min(max(self._next + (self.delta if low else -self.delta), 0.0), self.largest)

    def assign(self, credit: Credit, rollout: RolloutBatch, ctx: CreditContext) -> Credit:
        ctx.log("coefficient", self._now(ctx))
        return credit

    def penalty(self, tokens: Tokens, ctx: CreditContext) -> Tensor | None:
        coefficient = self._now(ctx)
        return -coefficient * tokens.entropies if coefficient else None

    def _now(self, ctx: CreditContext) -> float:
        """The coefficient of the context's phase."""
        return at(self.coefficient, ctx) if self.target is None else self._applied

    def state_dict(self) -> dict[str, Any]:
        return {"next": self._next, "applied": self._applied}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._next, self._applied = state_dict["next"], state_dict["applied"]
