"""Train on the tokens of highest entropy alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from lit_rlvr.credit import CreditCallback, CreditContext
from lit_rlvr.hashing import hash_integers
from lit_rlvr.reduce import mean
from lit_rlvr.selection import share, sortable, top_k
from lit_rlvr.types import Credit, RolloutBatch


class EntropyTopK(CreditCallback):
    """Keep the ``rho`` share of response tokens whose entropy is highest; the others do not learn.

    Exactly ceil(rho * n) of the n tokens that still learn are kept, over the whole phase and all ranks. Ties go to the
    earlier position in the response, then to the earlier draw and sample. The entropy is that of the policy that the
    phase began with, over the full vocabulary at the sampling temperature.

    Source: Wang et al. 2025, "Beyond the 80/20 rule" (arXiv 2506.01939), Eq. 1 and Eq. 6; ``normalize: selected``
    is v2, ``all`` is v1. ``bottom`` with ``rho: 0.8`` is the control of its Fig. 7. The paper takes the threshold
    per micro-batch from the current policy; here the set does not depend on the micro-batch size.

    Args:
        rho: Share of tokens to keep, in (0, 1].
        select: ``top`` or ``bottom`` by entropy, or ``random`` (by a hash of seed and token, as a control).
        normalize: Divide the loss by the number of ``selected`` tokens, or of ``all`` tokens.
        stages: Act only in these stages.
        name: Name in logs and checkpoints.

    Raises:
        ValueError: For a ``rho`` outside (0, 1].
    """

    def __init__(
        self,
        rho: float = 0.2,
        select: Literal["top", "bottom", "random"] = "top",
        normalize: Literal["selected", "all"] = "selected",
        stages: list[str] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(stages, name)
        if not 0 < rho <= 1:
            raise ValueError(f"EntropyTopK.rho must lie in (0, 1], got {rho}")
        if select not in ("top", "bottom", "random") or normalize not in ("selected", "all"):
            raise ValueError(
                f"EntropyTopK.select must be top, bottom or random and normalize selected or all; "
                f"got {select!r} and {normalize!r}"
            )
        self.rho, self.select, self.normalize = rho, select, normalize

    def assign(self, credit: Credit, rollout: RolloutBatch, ctx: CreditContext) -> Credit:
        eligible = credit.weight > 0
        total = int(ctx.reduce.sum(eligible.sum()))
        earlier_first = (1 << 63) - 1 - rollout.token_order()
        kept = top_k([self._rank(rollout, ctx.seed), earlier_first], eligible, share(self.rho, total), ctx.reduce)
        self._log(rollout, eligible, kept, ctx)
        dropped = eligible & ~kept
        return replace(
            credit,
            weight=credit.weight.masked_fill(dropped, 0.0),
            count=credit.count.masked_fill(dropped, 0.0) if self.normalize == "selected" else credit.count,
        )

    def _rank(self, rollout: RolloutBatch, seed: int) -> Tensor:
        """The number by which tokens are chosen, larger first [B, T]."""
        if self.select == "random":
            return hash_integers(seed, rollout.uid[:, :1], rollout.token_order()) & ((1 << 63) - 1)
        order = sortable(rollout.entropies)
        return order if self.select == "top" else (1 << 32) - 1 - order

    def _log(self, rollout: RolloutBatch, eligible: Tensor, kept: Tensor, ctx: CreditContext) -> None:
        entropies = rollout.entropies
        ctx.log("kept_fraction", mean(ctx.reduce, kept[eligible]))
        ctx.log("entropy_kept", mean(ctx.reduce, entropies, kept))
        ctx.log("entropy_dropped", mean(ctx.reduce, entropies, eligible & ~kept))
        learning = eligible.any(-1)
        ctx.log("sequences_without_kept", mean(ctx.reduce, ~kept.any(-1)[learning]))
        if self.select != "random":
            edge = torch.where(kept, -entropies if self.select == "top" else entropies, -torch.inf)
            extreme = ctx.reduce.max(edge.amax() if edge.numel() else torch.tensor(-torch.inf))
            threshold = -float(extreme) if self.select == "top" else float(extreme)
            ctx.log("threshold", threshold if abs(threshold) < float("inf") else 0.0)
