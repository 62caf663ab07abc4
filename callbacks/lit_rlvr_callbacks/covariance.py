"""What Clip-Cov and KL-Cov share: how a token's advantage goes together with its log-probability."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from lit_rlvr.credit import CreditCallback, CreditContext
from lit_rlvr.reduce import LocalReduce, Reduce, mean
from lit_rlvr.types import Credit


class CovarianceCallback(CreditCallback):
    """Base of callbacks that choose a small fraction of the tokens by their covariance under the current policy.

    Args:
        ratio: Fraction of the tokens to choose, in [0, 1]; 0: none.
        scope: ``mini_batch`` or ``micro_batch``.
        stages: Act only in these stages.
        name: Name in logs and checkpoints.

    Raises:
        ValueError: For a ``ratio`` or ``scope`` out of range.
    """

    reads_current = True

    def __init__(
        self,
        ratio: float,
        scope: Literal["mini_batch", "micro_batch"] = "mini_batch",
        stages: list[str] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(stages, name)
        if not 0 <= ratio <= 1:
            raise ValueError(f"{type(self).__name__}.ratio is a fraction in [0, 1], not percent; got {ratio}")
        if scope not in ("mini_batch", "micro_batch"):
            raise ValueError(f"{type(self).__name__}.scope must be mini_batch or micro_batch, got {scope!r}")
        self.ratio, self.scope = ratio, scope

    def reduction(self, ctx: CreditContext) -> Reduce:
        """Over what is chosen: all ranks' mini-batch, or this rank's micro-batch."""
        return ctx.reduce if self.scope == "mini_batch" else LocalReduce()

    def wanted(self, eligible: Tensor, reduce: Reduce) -> int:
        """How many tokens to choose: floor(ratio * n), but at least one where there are any."""
        number = int(reduce.sum(eligible.sum()))
        return min(number, max(1, int(self.ratio * number))) if self.ratio else 0


def covariance(credit: Credit, logprobs: Tensor, eligible: Tensor, reduce: Reduce) -> Tensor:
    """(A - mean A)(log pi - mean log pi) of each eligible token, and 0 elsewhere; float64 [B, T].

    Args:
        credit: Holds the advantages [B, T].
        logprobs: Log-probabilities under the current policy [B, T].
        eligible: The tokens that the means are over [B, T].
        reduce: Reaches the ranks that the means are over.
    """
    advantage, logprobs = credit.advantage.double(), logprobs.double()
    centred = advantage - mean(reduce, advantage, eligible), logprobs - mean(reduce, logprobs, eligible)
    # Where all advantages are equal, only rounding of the mean would be left to choose by.
    return (centred[0] * centred[1]).round(decimals=9).masked_fill(~eligible, 0.0)
