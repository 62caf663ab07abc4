"""How tokens are averaged: the weight and count that every token starts with, and the denominator.

What dropping a token means under each rule is in ``docs/objective.md``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor


class Aggregation(ABC):
    """An averaging rule over the tokens of a mini-batch."""

    @abstractmethod
    def share(self, mask: Tensor) -> Tensor:
        """What each token starts with as weight and as count, from the response mask [B, T]; float32 [B, T]."""

    def denominator(self, count: float, sequences: float) -> float:
        """The loss's denominator, from the mini-batch's global sum of counts and number of sequences."""
        return count


@dataclass(frozen=True)
class TokenMean(Aggregation):
    """Every token counts the same. Source: DAPO (arXiv 2503.14476), Eq. 8."""

    def share(self, mask: Tensor) -> Tensor:
        return mask.float()


@dataclass(frozen=True)
class SequenceMean(Aggregation):
    """Mean over each response's tokens, then over responses. Source: GRPO (arXiv 2402.03300), Eq. 3."""

    def share(self, mask: Tensor) -> Tensor:
        return mask.float() / mask.sum(-1, keepdim=True).clamp(min=1)


@dataclass(frozen=True)
class ConstantLength(Aggregation):
    """Sum over tokens, divided by ``length`` for every response, whatever its own length and however many tokens learn.

    Source: Dr. GRPO (arXiv 2503.20783), section 3.2.

    Args:
        length: The constant, in tokens; the generation limit is the usual choice.
    """

    length: int

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError(f"ConstantLength.length must be at least 1 token, got {self.length}")

    def share(self, mask: Tensor) -> Tensor:
        return mask.float()

    def denominator(self, count: float, sequences: float) -> float:
        return sequences * self.length
