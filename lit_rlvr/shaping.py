"""Reward shaping and outcome filtering that belong to an algorithm rather than to a callback."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lit_rlvr.advantages import group_sum


@dataclass(frozen=True)
class OverlongPenalty:
    """A linear penalty on the last ``buffer`` tokens before the length limit.

    R += factor * min(-(L - (max_length - buffer)) / buffer, 0). Source: DAPO (arXiv 2503.14476), Eq. 13.

    Args:
        buffer: Width of the penalised zone, in tokens.
        factor: Penalty at the limit.
        max_length: Length at which the full penalty applies, in tokens; null: the rollout's ``max_new_tokens``.

    Raises:
        ValueError: When the buffer does not fit.
    """

    buffer: int = 4096
    factor: float = 1.0
    max_length: int | None = None

    def __post_init__(self) -> None:
        if self.buffer < 1 or (self.max_length is not None and self.buffer > self.max_length):
            raise ValueError(f"overlong.buffer must lie in 1..max_length, got {self.buffer} of {self.max_length}")

    def __call__(self, lengths: Tensor, limit: int) -> Tensor:
        """The penalty [B] (<= 0) of responses of ``lengths`` [B] tokens under the limit of ``limit`` tokens."""
        start = (self.max_length or limit) - self.buffer
        return self.factor * (-(lengths - start) / self.buffer).clamp(max=0.0)


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
