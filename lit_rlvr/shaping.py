"""Reward shaping and outcome filtering that belong to an algorithm rather than to a callback."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lit_rlvr.advantages import group_sum


@dataclass(frozen=True)
class OverlongPenalty:
    """A linear penalty on the last tokens before the length limit.

    R += factor * min(-(L - (L_max - buffer)) / buffer, 0). Source: DAPO (arXiv 2503.14476), Eq. 13, with a buffer of
    4096 in 20480 tokens: a share of 0.2.

    Args:
        buffer: Width of the penalised zone, in tokens; null: ``share`` of the limit.
        share: Width of the penalised zone as a share of the limit, where ``buffer`` is null.
        factor: Penalty at the limit.

    Raises:
        ValueError: When the zone is empty, or wider than the limit.
    """

    buffer: int | None = None
    share: float = 0.2
    factor: float = 1.0

    def __post_init__(self) -> None:
        if self.buffer is not None and self.buffer < 1:
            raise ValueError(f"overlong.buffer must be at least 1 token, got {self.buffer}")
        if not 0 < self.share <= 1:
            raise ValueError(f"overlong.share must lie in (0, 1], got {self.share}")

    def width(self, limit: int) -> int:
        """Width of the penalised zone in tokens, under the limit of ``limit`` tokens."""
        return max(1, round(self.share * limit)) if self.buffer is None else self.buffer

    def __call__(self, lengths: Tensor, limit: int) -> Tensor:
        """The penalty [B] (<= 0) of responses of ``lengths`` [B] tokens under the limit of ``limit`` tokens."""
        width = self.width(limit)
        return self.factor * (-(lengths - (limit - width)) / width).clamp(max=0.0)


@dataclass(frozen=True)
class DynamicSampling:
    """Keep only groups in which some responses are right and some wrong, and sample more prompts until enough are kept.

    Source: DAPO (arXiv 2503.14476), section 3.2. Groups are judged by the verified outcome, never by the shaped reward.

    Args:
        max_rounds: Sampling rounds per phase, the first included. 1 filters without refilling.

    Raises:
        ValueError: For fewer than one round.
    """

    max_rounds: int = 10

    def __post_init__(self) -> None:
        if self.max_rounds < 1:
            raise ValueError(f"dynamic_sampling.max_rounds must be at least 1, got {self.max_rounds}")

    @staticmethod
    def mixed(correct: Tensor, group: Tensor) -> Tensor:
        """True for rows whose group has 0 < number right < size [B]."""
        right, size = group_sum(correct, group)
        return (right > 0) & (right < size)
