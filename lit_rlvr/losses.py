"""Policy losses: what one token contributes. Pure functions of the log-ratio and the advantage."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lit_rlvr.devices import send

LOG_RATIO_LIMIT = 20.0
"""A token e^20 times as likely as before learns no more: float32 would overflow soon after, and spoil the step."""


class PolicyLoss(ABC):
    """A per-token surrogate objective, to be maximised.

    ``whole_responses`` says that a token's objective depends on the other tokens of its response, so that all of them
    are scored together; ``sequence_level`` that it is the same for all of them, so that callbacks cannot tell them
    apart.
    """

    whole_responses = False
    sequence_level = False

    def entering(self, log_ratio: Tensor, row: Tensor) -> Tensor:
        """The log-ratio that enters the surrogate of each token [m], from its own [m] and its response's number [m].

        The numbers are on the CPU: what follows from them must not wait for a GPU.
        """
        return log_ratio

    @abstractmethod
    def surrogate(self, log_ratio: Tensor, advantage: Tensor) -> Tensor:
        """Objective of each token, from the log-ratio that enters it and its advantage (any one shape)."""

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


@dataclass(frozen=True)
class GSPO(ClippedSurrogate):
    """The clipped surrogate of the whole response's ratio s = exp(mean over tokens of log r).

    At ``level: sequence`` all tokens of a response share s, gradients included. At ``level: token`` a token's ratio is
    sg[s] pi / sg[pi]: the same value, but each token's gradient is its own, so that callbacks may choose tokens. Use
    it with ``aggregation: SequenceMean``, as in the paper.

    Source: Zheng et al. 2025 (arXiv 2507.18071), Eq. 5 and 7 (sequence), Eq. 13 and 14 (token).

    Args:
        clip_low: Lower clip distance from 1.
        clip_high: Upper clip distance from 1.
        dual_clip: For negative advantages the objective is at least ``dual_clip * A``; must exceed 1. None: off.
        level: ``sequence`` or ``token``.
    """

    clip_low: float = 3e-4
    clip_high: float = 4e-4
    level: Literal["sequence", "token"] = "sequence"

    whole_responses = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.level not in ("sequence", "token"):
            raise ValueError(f"GSPO.level must be sequence or token, got {self.level!r}")

    @property
    def sequence_level(self) -> bool:  # type: ignore[override]
        """Whether all tokens of a response share one objective."""
        return self.level == "sequence"

    def entering(self, log_ratio: Tensor, row: Tensor) -> Tensor:
        _, inverse, sizes = torch.unique(row, return_inverse=True, return_counts=True)
        inverse, sizes = (send(numbers, log_ratio.device) for numbers in (inverse, sizes))
        sums = log_ratio.new_zeros(len(sizes))
        mean = (sums.index_add(0, inverse, log_ratio) / sizes)[inverse]
        return mean if self.level == "sequence" else mean.detach() + log_ratio - log_ratio.detach()


@dataclass(frozen=True)
class CISPO(PolicyLoss):
    """sg[min(r, cap)] A log pi: every token keeps its gradient, only its weight is bounded.

    The value that is logged has log pi - log pi_old in place of log pi: the same gradient, and 0 in a phase's first
    step.

    Source: MiniMax-M1 (arXiv 2506.13585), Eq. 4 and 5, with the lower bound off as in its experiments.

    Args:
        cap: Largest ratio itself, not a distance from 1: the paper's 1 + epsilon_high.

    Raises:
        ValueError: For a ``cap`` of at most 0.
    """

    cap: float = 5.0

    def __post_init__(self) -> None:
        if self.cap <= 0:
            raise ValueError(f"CISPO.cap is the largest ratio itself and must be > 0, got {self.cap}")

    def surrogate(self, log_ratio: Tensor, advantage: Tensor) -> Tensor:
        ratio = log_ratio.detach().clamp(max=LOG_RATIO_LIMIT).exp()
        return ratio.clamp(max=self.cap) * advantage * log_ratio

    def clipped(self, log_ratio: Tensor, advantage: Tensor) -> tuple[Tensor, Tensor]:
        capped = log_ratio.exp() > self.cap
        return torch.zeros_like(capped), capped
