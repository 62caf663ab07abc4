"""Mini-batches: what one optimiser step learns from, with denominators over all ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_rlvr.aggregation import Aggregation
from lit_rlvr.reduce import Reduce
from lit_rlvr.types import Credit, RolloutBatch


@dataclass(frozen=True)
class MiniBatch:
    """This rank's rows of an optimiser step, and the denominators over all ranks.

    Args:
        rollout: This rank's facts.
        credit: This rank's credit.
        denominator: Of the policy loss; 0 when no token of any rank learns.
        share: What each token counts where all response tokens do: in KL, penalties and value loss [B, T].
        share_denominator: Of those terms.
        sequences: Responses over all ranks.
        returns: What the critic learns to predict [B, T]; None without a critic.
        own_old: Use the training forward's own log-probabilities, detached, as the old ones.
        engine_old: The old log-probabilities of the facts are those of an engine that is not exact, and not of use but
            for measuring how far it is from the training forward.
    """

    rollout: RolloutBatch
    credit: Credit
    denominator: float
    share: Tensor
    share_denominator: float
    sequences: float
    returns: Tensor | None = None
    own_old: bool = False
    engine_old: bool = False

    @classmethod
    def of(
        cls,
        rollout: RolloutBatch,
        credit: Credit,
        aggregation: Aggregation,
        reduce: Reduce,
        *,
        returns: Tensor | None = None,
        own_old: bool = False,
        engine_old: bool = False,
    ) -> MiniBatch:
        """Make a mini-batch of this rank's rows; every rank calls it."""
        share = aggregation.share(rollout.response_mask)
        sums = [credit.count.double().sum(), share.double().sum(), torch.tensor(len(rollout)).double()]
        count, shares, sequences = reduce.sum(torch.stack([s.cpu() for s in sums])).tolist()
        return cls(
            rollout,
            credit,
            aggregation.denominator(count, sequences) if count else 0.0,
            share,
            aggregation.denominator(shares, sequences),
            sequences,
            returns,
            own_old,
            engine_old,
        )

    def with_credit(self, credit: Credit, aggregation: Aggregation, reduce: Reduce) -> MiniBatch:
        """The same rows with other credit; every rank calls it."""
        of_old = {"own_old": self.own_old, "engine_old": self.engine_old}
        return MiniBatch.of(self.rollout, credit, aggregation, reduce, returns=self.returns, **of_old)

    def denominator_of(self, credit: Credit, aggregation: Aggregation) -> float:
        """The denominator of a micro-batch that is divided by its own count.

        Its loss then has the weight of its share of the sequences: the rule of code that takes a mean in every
        micro-batch and averages over them.

        Args:
            credit: The credit of the micro-batch's rows [n, T].
            aggregation: The averaging rule.
        """
        count, rows = float(credit.count.double().sum()), float(len(credit.count))
        return aggregation.denominator(count, rows) * self.sequences / rows if count else 0.0
