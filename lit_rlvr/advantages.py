"""Base advantages: how good a response was, compared with its group. One class per rule.

Each maps rewards [B] and group numbers [B] to advantages [B]. A group's rows may stand anywhere, but all of them
must be on one rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


def group_sum(values: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of ``values`` [B] over each row's group, and the group's size; both [B], in float64."""
    _, inverse = torch.unique(group, return_inverse=True)
    sums = torch.zeros(int(inverse.max()) + 1 if len(group) else 0, dtype=torch.float64, device=values.device)
    sizes = sums.clone().index_add_(0, inverse, torch.ones_like(values, dtype=torch.float64))
    sums = sums.index_add_(0, inverse, values.double())
    return sums[inverse], sizes[inverse]


class Advantage(ABC):
    """A rule that turns a group's rewards into advantages."""

    smallest_group = 1

    @abstractmethod
    def __call__(self, rewards: Tensor, group: Tensor) -> Tensor:
        """Advantages [B] of ``rewards`` [B] in the groups ``group`` [B]."""


@dataclass(frozen=True)
class GroupNormalized(Advantage):
    """(R - mean) / (std + eps) over the group, with the unbiased standard deviation.

    Source: GRPO, Shao et al. 2024 (arXiv 2402.03300), section 4.1.2.

    Args:
        eps: Added to the standard deviation.
    """

    eps: float = 1e-6
    smallest_group = 2

    def __call__(self, rewards: Tensor, group: Tensor) -> Tensor:
        total, size = group_sum(rewards, group)
        centred = rewards.double() - total / size
        squares, _ = group_sum(centred**2, group)
        std = (squares / (size - 1)).sqrt()
        return (centred / (std + self.eps)).to(rewards.dtype)


@dataclass(frozen=True)
class GroupCentred(Advantage):
    """R - mean over the group, without the standard deviation.

    Source: Dr. GRPO, Liu et al. 2025 (arXiv 2503.20783), which drops it because it favours very easy and very hard
    prompts.
    """

    smallest_group = 2

    def __call__(self, rewards: Tensor, group: Tensor) -> Tensor:
        total, size = group_sum(rewards, group)
        return (rewards.double() - total / size).to(rewards.dtype)


@dataclass(frozen=True)
class LeaveOneOut(Advantage):
    """R - mean of the *other* responses of the group.

    Source: RLOO, Ahmadian et al. 2024 (arXiv 2402.14740).
    """

    smallest_group = 2

    def __call__(self, rewards: Tensor, group: Tensor) -> Tensor:
        total, size = group_sum(rewards, group)
        return (rewards.double() - (total - rewards.double()) / (size - 1)).to(rewards.dtype)


@dataclass(frozen=True)
class Raw(Advantage):
    """The reward itself: REINFORCE without a baseline."""

    def __call__(self, rewards: Tensor, group: Tensor) -> Tensor:
        return rewards.clone()
