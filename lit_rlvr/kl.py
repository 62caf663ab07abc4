"""Distance to the reference policy: per-token estimators, and whether they enter the loss or the reward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Log pi - log pi_ref: unbiased, can be negative. Source: Schulman 2020, "Approximating KL divergence"."""
    return logprobs - ref_logprobs


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """(log pi - log pi_ref)^2 / 2: biased, never negative. Source: as :func:`k1`."""
    return 0.5 * (logprobs - ref_logprobs) ** 2


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """exp(x) - x - 1 with x = log pi_ref - log pi: unbiased, never negative. Source: as :func:`k1`; GRPO, Eq. 4."""
    x = ref_logprobs - logprobs
    return x.exp() - x - 1


ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}


@dataclass(frozen=True)
class KLPenalty:
    """A penalty for leaving the reference policy, over all response tokens.

    Args:
        beta: Coefficient.
        estimator: ``k1``, ``k2`` or ``k3``, see :mod:`lit_rlvr.kl`. The gradient of ``k1`` in the loss has zero
            mean, so that pair is refused.
        where: ``loss`` adds ``beta * KL``, averaged over response tokens by the aggregation rule, to the loss;
            ``reward`` subtracts ``beta *`` the response's summed KL from its reward, before the base advantage.

    Raises:
        ValueError: For a negative ``beta``, or ``k1`` in the loss.
    """

    beta: float = 0.04
    estimator: Literal["k1", "k2", "k3"] = "k3"
    where: Literal["loss", "reward"] = "loss"

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise ValueError(f"kl.beta must be > 0, got {self.beta}; leave kl null to train without a reference model")
        if self.estimator == "k1" and self.where == "loss":
            raise ValueError(
                "kl.estimator k1 in the loss has a gradient with zero mean; use k2 or k3, or where: reward"
            )

    def __call__(self, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
        """The estimator, per token."""
        return ESTIMATORS[self.estimator](logprobs, ref_logprobs)
