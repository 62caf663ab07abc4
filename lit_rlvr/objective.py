"""The loss of one micro-batch, token by token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lit_rlvr.blame import blame
from lit_rlvr.credit import CreditCallback, CreditContext, penalises, penalties
from lit_rlvr.credit_laws import check_shape
from lit_rlvr.devices import send
from lit_rlvr.kl import KLPenalty, k3
from lit_rlvr.losses import PolicyLoss
from lit_rlvr.meter import Meter, wide
from lit_rlvr.microbatch import MicroBatch
from lit_rlvr.minibatch import MiniBatch
from lit_rlvr.types import Tokens


class TokenObjective:
    """Minus the weighted surrogate, plus what holds the policy back, over the tokens of one micro-batch.

    A :class:`~lit_rlvr.head.TokenLoss`: unless the loss is about whole responses, it may be called chunk by chunk.

    Args:
        mini: The mini-batch that the tokens belong to.
        micro: Which tokens, in order.
        loss: The surrogate.
        kl: The KL penalty, if it is part of the loss.
        chain: The credit callbacks, for their penalties.
        ctx: Step and stage.
        scale: Factor on the loss; the number of ranks, because the strategy averages gradients over them.
        meter: Collects what is logged.
    """

    def __init__(
        self,
        mini: MiniBatch,
        micro: MicroBatch,
        loss: PolicyLoss,
        kl: KLPenalty | None,
        chain: Sequence[CreditCallback],
        ctx: CreditContext,
        scale: float,
        meter: Meter,
    ) -> None:
        def pick(values: Tensor) -> Tensor:
            return send(values[micro.row, micro.column], micro.ids.device)

        self.loss, self.kl, self.chain, self.ctx, self.scale, self.meter = loss, kl, chain, ctx, scale, meter
        self.row, self.penalised = micro.row, penalises(chain)
        credit = mini.credit
        self.advantage, self.weight = pick(credit.advantage), pick(credit.weight)
        self.kl_coef = None if credit.kl_coef is None else pick(credit.kl_coef)
        self.denominator, self.share_denominator = mini.denominator or 1.0, mini.share_denominator or 1.0
        self.old = None if mini.own_old else pick(mini.rollout.old_logprobs)
        self.engine = pick(mini.rollout.old_logprobs) if mini.engine_old else None
        if kl is not None or self.penalised:
            self.share = pick(mini.share)
        if kl is not None:
            assert mini.rollout.ref_logprobs is not None
            self.ref = pick(mini.rollout.ref_logprobs)

    def __call__(self, logprobs: Tensor, entropies: Tensor, part: slice) -> Tensor:
        old = logprobs.detach() if self.old is None else self.old[part]
        advantage, weight = self.advantage[part], self.weight[part]
        log_ratio = logprobs - old
        with blame(self.loss, "entering"):
            entering = self.loss.entering(log_ratio, self.row[part])
        with blame(self.loss, "surrogate"):
            surrogate = self.loss.surrogate(entering, advantage)
        check_shape(surrogate, log_ratio, f"{type(self.loss).__name__}.surrogate returned")
        objective = weight * surrogate
        if self.kl_coef is not None:
            objective = objective - self.kl_coef[part] * log_ratio.abs()
        total = -objective.sum() / self.denominator
        total = total + self._held_back(logprobs, entropies, old, part)
        self._measure(log_ratio.detach(), entering.detach(), entropies.detach(), part, total.detach())
        if self.engine is not None:
            self._compare(logprobs.detach(), self.engine[part])
        return total * self.scale

    def _held_back(self, logprobs: Tensor, entropies: Tensor, old: Tensor, part: slice) -> Tensor:
        """KL to the reference and the callbacks' penalties: about every response token, whatever its credit."""
        total = logprobs.new_zeros(())
        if self.kl is not None:
            kl = self.kl(logprobs, self.ref[part])
            total = total + self.kl.beta * (self.share[part] * kl).sum() / self.share_denominator
            self.meter.add(kl_ref=kl.detach().sum(), ref_tokens=float(len(kl)))
        if self.penalised:
            added = penalties(self.chain, Tokens(logprobs, entropies, old, self.advantage[part]), self.ctx)
            total = total + (self.share[part] * added).sum() / self.share_denominator
            self.meter.add(penalty=added.detach().sum(), penalty_tokens=float(len(added)))
        return total

    def _measure(self, log_ratio: Tensor, entering: Tensor, entropies: Tensor, part: slice, loss: Tensor) -> None:
        learns = self.weight[part] > 0
        with blame(self.loss, "clipped"):
            low, high = self.loss.clipped(entering, self.advantage[part])
        each = {
            "ratio": log_ratio.exp(), "clip_low": low, "clip_high": high,
            "kl_old": k3(log_ratio, torch.zeros_like(log_ratio)), "entropy": entropies,
        }  # fmt: skip
        # Picking the tokens that learn would have to wait for a GPU to count them.
        sums = {name: torch.where(learns, values, torch.zeros_like(values)).sum() for name, values in each.items()}
        self.meter.add(tokens=learns.sum(), loss=loss, **sums)
        self.meter.extremes(ratio=torch.where(learns, log_ratio, torch.zeros_like(log_ratio)))

    def _compare(self, logprobs: Tensor, engine: Tensor) -> None:
        """Measure how far the engine's probabilities are from these."""
        log_ratio = wide(logprobs - engine)
        self.meter.add(engine_ratio=log_ratio.exp().sum(), engine_tokens=float(len(log_ratio)))
        self.meter.extremes(engine_ratio=log_ratio)
