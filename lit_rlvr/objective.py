"""The loss of one micro-batch, token by token, and the numbers that are logged about it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_rlvr.kl import KLPenalty, k3
from lit_rlvr.losses import PolicyLoss
from lit_rlvr.microbatch import MicroBatch
from lit_rlvr.reduce import Reduce
from lit_rlvr.types import Credit, RolloutBatch


@dataclass(frozen=True)
class MiniBatch:
    """What one optimiser step learns from: this rank's rows and the denominators over all ranks.

    Args:
        rollout: This rank's facts.
        credit: This rank's credit.
        denominator: Of the policy loss; 0 when no token of any rank learns.
        kl_share: Share of each token in the KL term [B, T].
        kl_denominator: Of the KL term.
        own_old: Use the training forward's own log-probabilities, detached, as the old ones.
    """

    rollout: RolloutBatch
    credit: Credit
    denominator: float
    kl_share: Tensor
    kl_denominator: float
    own_old: bool = False


class Meter:
    """Sums and maxima over the micro-batches of a step, on the CPU."""

    SUMS = ("tokens", "loss", "ratio", "clip_low", "clip_high", "kl_old", "entropy", "kl_ref", "ref_tokens")

    def __init__(self) -> None:
        self.sums = torch.zeros(len(self.SUMS), dtype=torch.float64)
        self.ratio_max = torch.zeros((), dtype=torch.float64)

    def add(self, **values: Tensor | float) -> None:
        for name, value in values.items():
            self.sums[self.SUMS.index(name)] += float(value)

    def read(self, reduce: Reduce) -> dict[str, float]:
        """Means over all ranks' learning tokens, as ``train/...``."""
        total = dict(zip(self.SUMS, reduce.sum(self.sums).tolist(), strict=True))
        tokens, ref_tokens = max(total["tokens"], 1.0), max(total["ref_tokens"], 1.0)
        metrics = {f"train/{name}": total[name] / tokens for name in self.SUMS[2:7]}
        metrics |= {"train/loss": total["loss"], "train/tokens": total["tokens"]}
        metrics["train/ratio_max"] = float(reduce.max(self.ratio_max))
        if total["ref_tokens"]:
            metrics["train/kl_ref"] = total["kl_ref"] / ref_tokens
        return metrics


class TokenObjective:
    """Minus the weighted surrogate, plus the KL penalty, over the tokens of one micro-batch: a :class:`TokenLoss`.

    Args:
        mini: The mini-batch that the tokens belong to.
        micro: Which tokens, in order.
        loss: The surrogate.
        kl: The KL penalty, if it is part of the loss.
        scale: Factor on the loss; the number of ranks, because the strategy averages gradients over them.
        meter: Collects what is logged.
    """

    def __init__(
        self, mini: MiniBatch, micro: MicroBatch, loss: PolicyLoss, kl: KLPenalty | None, scale: float, meter: Meter
    ) -> None:
        def pick(values: Tensor) -> Tensor:
            return values[micro.row.to(values.device), micro.column.to(values.device)].to(micro.ids.device)

        self.loss, self.kl, self.scale, self.meter = loss, kl, scale, meter
        self.advantage, self.weight = pick(mini.credit.advantage), pick(mini.credit.weight)
        self.denominator, self.kl_denominator = mini.denominator or 1.0, mini.kl_denominator or 1.0
        self.old = None if mini.own_old else pick(mini.rollout.old_logprobs)
        if kl is not None:
            assert mini.rollout.ref_logprobs is not None
            self.ref, self.kl_share = pick(mini.rollout.ref_logprobs), pick(mini.kl_share)

    def __call__(self, logprobs: Tensor, entropies: Tensor, part: slice) -> Tensor:
        old = logprobs.detach() if self.old is None else self.old[part]
        advantage, weight = self.advantage[part], self.weight[part]
        log_ratio = logprobs - old
        surrogate = self.loss.surrogate(log_ratio, advantage)
        total = -(weight * surrogate).sum() / self.denominator
        if self.kl is not None:
            penalty = self.kl(logprobs, self.ref[part])
            total = total + self.kl.beta * (self.kl_share[part] * penalty).sum() / self.kl_denominator
            self.meter.add(kl_ref=penalty.detach().sum(), ref_tokens=float(len(penalty)))
        self._measure(logprobs.detach(), old, entropies.detach(), advantage, weight > 0, total.detach())
        return total * self.scale

    def _measure(
        self, logprobs: Tensor, old: Tensor, entropies: Tensor, advantage: Tensor, learns: Tensor, loss: Tensor
    ) -> None:
        log_ratio = logprobs - old
        low, high = self.loss.clipped(log_ratio, advantage)
        ratio = log_ratio.exp()
        self.meter.add(
            tokens=learns.sum(), loss=loss, ratio=ratio[learns].sum(), clip_low=(low & learns).sum(),
            clip_high=(high & learns).sum(), kl_old=k3(logprobs, old)[learns].sum(), entropy=entropies[learns].sum(),
        )  # fmt: skip
        if bool(learns.any()):
            self.meter.ratio_max = torch.maximum(self.meter.ratio_max, ratio[learns].max().double().cpu())
