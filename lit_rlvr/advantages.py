"""Base advantages: how good a response was, compared with others. One class per rule.

Each maps rewards [B] and group numbers [B] to advantages [B]. A group's rows may stand anywhere, but all of them
must be on one rank. Rules about single tokens, with a critic, are in :mod:`lit_rlvr.gae`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lit_rlvr.reduce import LocalReduce, Reduce

ONE_PROCESS = LocalReduce()


def group_sum(values: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of ``values`` [B] over each row's group, and the group's size; both [B], in float64."""
    _, inverse = torch.unique(group, return_inverse=True)
    sums = torch.zeros(int(inverse.max()) + 1 if len(group) else 0, dtype=torch.float64, device=values.device)
    sizes = sums.clone().index_add_(0, inverse, torch.ones_like(values, dtype=torch.float64))
    sums = sums.index_add_(0, inverse, values.double())
    return sums[inverse], sizes[inverse]


class Advantage(ABC):
    """A rule that turns the rewards of responses into advantages."""

    smallest_group = 1
    needs_critic = False

    @abstractmethod
    def __call__(self, rewards: Tensor, group: Tensor, reduce: Reduce = ONE_PROCESS) -> Tensor:
        """Advantages [B] of ``rewards`` [B] in the groups ``group`` [B]; ``reduce`` reaches the other ranks."""


@dataclass(frozen=True)
class GroupNormalized(Advantage):
    """(R - mean) / (std + eps) over the group, with the unbiased standard deviation.

    Source: GRPO, Shao et al. 2024 (arXiv 2402.03300), section 4.1.2.

    Args:
        eps: Added to the standard deviation.
    """

    eps: float = 1e-6
    smallest_group = 2

    def __call__(self, rewards: Tensor, group: Tensor, reduce: Reduce = ONE_PROCESS) -> Tensor:
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

    def __call__(self, rewards: Tensor, group: Tensor, reduce: Reduce = ONE_PROCESS) -> Tensor:
        total, size = group_sum(rewards, group)
        return (rewards.double() - total / size).to(rewards.dtype)


@dataclass(frozen=True)
class LeaveOneOut(Advantage):
    """R - mean of the *other* responses of the group.

    Source: RLOO, Ahmadian et al. 2024 (arXiv 2402.14740).
    """

    smallest_group = 2

    def __call__(self, rewards: Tensor, group: Tensor, reduce: Reduce = ONE_PROCESS) -> Tensor:
        total, size = group_sum(rewards, group)
        return (rewards.double() - (total - rewards.double()) / (size - 1)).to(rewards.dtype)


@dataclass(frozen=True)
class Raw(Advantage):
    """The reward itself: REINFORCE without a baseline."""

    def __call__(self, rewards: Tensor, group: Tensor, reduce: Reduce = ONE_PROCESS) -> Tensor:
        return rewards.clone()


@dataclass(frozen=True)
class BatchNormalized(Advantage):
    """Rewards centred, then divided by their standard deviation over *all* responses of the phase and ranks.

    Source: REINFORCE++, Hu et al. 2025 (arXiv 2501.03262): ``centre: batch`` is REINFORCE++, ``centre: group`` is
    REINFORCE++-baseline, which subtracts each group's mean first.

    Args:
        centre: Subtract the mean over the ``batch``, or over each ``group`` and then over the batch.
        eps: Added to the standard deviation.

    Raises:
        ValueError: For another ``centre``.
    """

    centre: Literal["batch", "group"] = "batch"
    eps: float = 1e-8

    def __post_init__(self) -> None:
        if self.centre not in ("batch", "group"):
            raise ValueError(f"BatchNormalized.centre must be batch or group, got {self.centre!r}")

    @property
    def smallest_group(self) -> int:  # type: ignore[override]
        """A group's mean says nothing about a group of one."""
        return 2 if self.centre == "group" else 1

    def __call__(self, rewards: Tensor, group: Tensor, reduce: Reduce = ONE_PROCESS) -> Tensor:
        values = rewards.double()
        if self.centre == "group":
            total, size = group_sum(rewards, group)
            values = values - total / size
        return whiten(values, torch.ones_like(values, dtype=torch.bool), reduce, self.eps).to(rewards.dtype)


def whiten(values: Tensor, mask: Tensor, reduce: Reduce, eps: float = 1e-8) -> Tensor:
    """(v - mean) / (std + eps) where ``mask`` is true, over all ranks (unbiased std); 0 elsewhere.

    >>> whiten(torch.tensor([1.0, 3.0, 9.0]), torch.tensor([True, True, False]), ONE_PROCESS, 0.0).tolist()
    [-0.7071067811865475, 0.7071067811865475, 0.0]
    """
    picked = values[mask].double()
    total, number = reduce.sum(torch.stack([picked.sum(), torch.tensor(len(picked)).to(picked)]))
    centred = torch.where(mask, values.double() - total / number.clamp(min=1), 0.0)
    squares = reduce.sum((centred**2).sum())
    whitened: Tensor = centred / ((squares / (number - 1).clamp(min=1)).sqrt() + eps)
    return whitened
