"""Generalised advantage estimation: advantages of single tokens, with a critic."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_rlvr.advantages import ONE_PROCESS, Advantage, whiten
from lit_rlvr.reduce import Reduce


@dataclass(frozen=True)
class GAE(Advantage):
    """A_t = sum over l of (gamma lam)^l delta_{t+l}, with delta_t = r_t + gamma V_{t+1} - V_t and V = 0 after the end.

    The response's reward stands at its last token; a KL penalty in the reward stands at each token. Needs
    ``model.critic``.

    Source: Schulman et al. 2015 (arXiv 1506.02438), Eq. 16; gamma = lam = 1 is usual for outcome rewards.

    Args:
        gamma: Discount per token.
        lam: Trace decay: 1 is the return minus the value, 0 the one-step error.
        whiten: Give the advantages of all response tokens mean 0 and standard deviation 1, over all ranks.

    Raises:
        ValueError: When ``gamma`` or ``lam`` is outside [0, 1].
    """

    gamma: float = 1.0
    lam: float = 1.0
    whiten: bool = True
    needs_critic = True

    def __post_init__(self) -> None:
        if not (0 <= self.gamma <= 1 and 0 <= self.lam <= 1):
            raise ValueError(f"GAE.gamma and lam must lie in [0, 1], got {self.gamma} and {self.lam}")

    def __call__(self, rewards: Tensor, group: Tensor, reduce: Reduce = ONE_PROCESS) -> Tensor:
        raise AssertionError("GAE is about tokens: see of_tokens")

    def of_tokens(self, rewards: Tensor, values: Tensor, mask: Tensor, reduce: Reduce) -> tuple[Tensor, Tensor]:
        """Advantages and returns.

        Args:
            rewards: Reward of each token [B, T].
            values: The critic's value of the state before each token [B, T].
            mask: Response tokens [B, T].
            reduce: Reaches the other ranks, for whitening.

        Returns:
            Advantages [B, T] and returns [B, T] (advantage before whitening, plus value); 0 off the mask.
        """
        r, v = rewards.double() * mask, values.double() * mask
        following = torch.cat([v[:, 1:], v.new_zeros(len(v), 1)], dim=1)
        delta = (r + self.gamma * following - v) * mask
        advantage, trace = torch.zeros_like(delta), delta.new_zeros(len(delta))
        for t in range(delta.shape[1] - 1, -1, -1):
            trace = delta[:, t] + self.gamma * self.lam * trace
            advantage[:, t] = trace
        returns = (advantage + v).to(values.dtype)
        if self.whiten:
            advantage = whiten(advantage, mask, reduce)
        return advantage.to(values.dtype), returns
