"""Detect when training passes from its rising stage to the plateau."""

from __future__ import annotations

import logging
from typing import Any

from lit_rlvr.credit import CreditCallback, CreditContext
from lit_rlvr.reduce import mean
from lit_rlvr.types import RolloutBatch

log = logging.getLogger(__name__)


class StageDetector(CreditCallback):
    """Names the stage, ``rising`` or ``plateau``, for callbacks that act only in some.

    Online: the mean token entropy is smoothed (exponential moving average); the plateau begins when its relative drop
    over ``window`` rollout phases has stayed below ``drop`` for ``patience`` phases in a row. Or at a fixed phase,
    ``at_step``. The plateau does not end. The step of the change is logged as ``plateau_step``.

    Source: the two stages are from Deng et al. 2025 (arXiv 2508.02260), which publishes no numeric rule and draws the
    line at about phase 200 in its runs; the online rule is this project's own.

    Args:
        window: Distance, in rollout phases, over which the drop is measured.
        drop: Relative drop of the smoothed entropy below which training counts as flat.
        patience: Flat phases in a row that make a plateau.
        smoothing: Weight of the newest phase in the moving average, in (0, 1].
        at_step: Begin the plateau at this rollout phase, whatever the entropy does; null: detect it.
        name: Name in logs and checkpoints.

    Raises:
        ValueError: For a number out of range.
    """

    token_level = False

    def __init__(
        self,
        window: int = 5,
        drop: float = 0.1,
        patience: int = 3,
        smoothing: float = 0.3,
        at_step: int | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(None, name)
        if window < 1 or patience < 1:
            raise ValueError(f"StageDetector.window and patience must be at least 1, got {window} and {patience}")
        if not 0 < smoothing <= 1 or not 0 <= drop < 1:
            raise ValueError(f"StageDetector needs smoothing in (0, 1] and drop in [0, 1), got {smoothing} and {drop}")
        self.window, self.drop, self.patience, self.smoothing, self.at_step = window, drop, patience, smoothing, at_step
        self._smoothed: list[float] = []
        self._flat = 0
        self.plateau_step: int | None = None

    def stage(self) -> str:
        return "rising" if self.plateau_step is None else "plateau"

    def observe(self, rollout: RolloutBatch, ctx: CreditContext) -> None:
        if not float(ctx.reduce.sum(rollout.response_mask.sum())):
            return  # dynamic sampling kept nothing: no entropy to look at
        entropy = mean(ctx.reduce, rollout.entropies, rollout.response_mask)
        last = self._smoothed[-1] if self._smoothed else entropy
        smoothed = last + self.smoothing * (entropy - last)
        self._smoothed = [*self._smoothed, smoothed][-self.window - 1 :]
        if len(self._smoothed) > self.window:
            relative = 1 - smoothed / self._smoothed[0] if self._smoothed[0] > 0 else 0.0
            self._flat = self._flat + 1 if relative < self.drop else 0
            ctx.log("relative_drop", relative)
        due = ctx.step >= self.at_step if self.at_step is not None else self._flat >= self.patience
        if self.plateau_step is None and due:
            self.plateau_step = ctx.step
            if ctx.reduce.rank == 0:
                log.info("stage: rising → plateau at rollout phase %d (smoothed entropy %.4f nats)", ctx.step, smoothed)
        ctx.log("smoothed_entropy", smoothed)
        ctx.log("plateau", float(self.plateau_step is not None))
        ctx.log("plateau_step", -1 if self.plateau_step is None else self.plateau_step)

    def state_dict(self) -> dict[str, Any]:
        return {"smoothed": list(self._smoothed), "flat": self._flat, "plateau_step": self.plateau_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._smoothed = list(state_dict["smoothed"])
        self._flat, self.plateau_step = state_dict["flat"], state_dict["plateau_step"]
