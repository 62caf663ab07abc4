"""Policy losses: what one token contributes. Pure functions of the log-ratio and the advantage."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

LOG_RATIO_LIMIT = 20.0
"""A token e^20 times as likely as before learns no more: float32 would overflow soon after, and spoil the step."""


class PolicyLoss(ABC):
    """A per-token surrogate objective, to be maximised."""

    @abstractmethod
    def surrogate(self, log_ratio: Tensor, advantage: Tensor) -> Tensor:
        """Objective of each token, from ``log pi - log pi_old`` and its advantage (any one shape)."""

    @abstractmethod
    def clipped(self, log_ratio: Tensor, advantage: Tensor) -> tuple[Tensor, Tensor]:
        """Which tokens the lower and the upper clip hold back: two bool tensors."""


@dataclass(frozen=True)
class ClippedSurrogate(PolicyLoss):
    """min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), the objective of PPO, GRPO and DAPO.

    Source: Schulman et al. 2017, Eq. 7; separate bounds from DAPO (Yu et al. 2025, arXiv 2503.14476), Eq. 8;
    dual clip from Ye et al. 2020 (arXiv 1912.09729), Eq. 5.

    Args:
        clip_low: Lower clip distance from 1.
        clip_high: Upper clip distance from 1.
        dual_clip: For negative advantages the objective is at least ``dual_clip * A``; must exceed 1. None: off.

    Raises:
        ValueError: When a bound is out of range.
    """

    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.clip_low <= 1 or self.clip_high < 0:
            raise ValueError(
                f"clip_low must lie in [0, 1] and clip_high must be >= 0, got {self.clip_low} and {self.clip_high}"
            )
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise ValueError(f"dual_clip must be > 1, got {self.dual_clip}; leave it null to switch it off")

    def surrogate(self, log_ratio: Tensor, advantage: Tensor) -> Tensor:
        ratio = log_ratio.clamp(max=LOG_RATIO_LIMIT).exp()
        clipped = ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
        objective = torch.minimum(ratio * advantage, clipped * advantage)
        if self.dual_clip is not None:
            floor = self.dual_clip * advantage
            objective = torch.where(advantage < 0, torch.maximum(objective, floor), objective)
        return objective

    def clipped(self, log_ratio: Tensor, advantage: Tensor) -> tuple[Tensor, Tensor]:
        ratio = log_ratio.exp()
        return (ratio < 1 - self.clip_low) & (advantage < 0), (ratio > 1 + self.clip_high) & (advantage > 0)
