"""Train on the tokens of highest entropy alone."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, cast

from torch import Tensor

from lit_rlvr.credit import CreditCallback, CreditContext, Scope
from lit_rlvr.hashing import hash_integers
from lit_rlvr.reduce import LocalReduce, Reduce
from lit_rlvr.schedule import Schedule, at, ends
from lit_rlvr.scoring import engine_is_exact
from lit_rlvr.selection import quantile, share, sortable, top_k
from lit_rlvr.types import Credit, RolloutBatch
from lit_rlvr_callbacks.kept import describe
from lit_rlvr_callbacks.presets import PRESETS, check_choices

if TYPE_CHECKING:
    from lit_rlvr.module import RLVRModule

log = logging.getLogger(__name__)
LARGEST = (1 << 63) - 1


class EntropyTopK(CreditCallback):
    """Keep the ``rho`` share of response tokens whose entropy is highest; the others do not learn.

    The entropy is over the full vocabulary at the sampling temperature. Only tokens that still have a weight are
    compared and kept. What is published differs in whose entropies are compared, among which tokens, and in what the
    loss is divided by; a ``preset`` is one such reading, and each of its options can be changed alone:

    * ``invariant`` (default): old, phase, global, selected, exact. Exactly ceil(rho n) of the n tokens of a rollout
      phase over all ranks, so nothing depends on the sizes of micro-batches or on the number of ranks.
    * ``paper_v2``: current, micro_batch, local, selected, exact. The paper's second version and its released code:
      ceil(rho n) of the n tokens of each micro-batch on each rank, whose loss is divided by its own kept tokens and
      enters with the micro-batch's share of the sequences. Not reproduced: torch.topk's order among equal entropies,
      one token more where rho n is a whole number that floating point rounds up, and clip fractions over all tokens.
    * ``paper_v1``: the same, divided by all tokens of the micro-batch, as in the paper's first version.
    * ``trl``: current, micro_batch, global, all, quantile. TRL's ``top_entropy_quantile``: tokens whose entropy
      reaches the interpolated 1 - rho quantile of the micro-batches of all ranks, divided by all tokens of the
      mini-batch (TRL's ``loss_type: dapo``, its default). More than rho are kept where entropies are tied.

    Among equal entropies an ``exact`` choice takes the earlier position in the response, then the earlier draw and
    sample. ``scope: micro_batch`` needs ``batch.micro_rows``. ``source: current`` at ``scope: mini_batch`` costs a
    scoring pass before each optimiser step of a phase but the first.

    Source: Wang et al. 2025, "Beyond the 80/20 rule" (arXiv 2506.01939), Eq. 1 and Eq. 6; ``bottom`` with
    ``rho: 0.8`` is the control of its Fig. 7.

    Args:
        rho: Share of tokens to keep, in (0, 1]; a number, or a schedule over rollout phases or by stage. null: 0.2.
        select: ``top`` or ``bottom`` by entropy, the ``band`` between two quantiles, or ``random`` (by a hash of seed
            and token, as a control).
        normalize: Count the ``selected`` tokens in the loss's denominator, or ``all`` tokens; null: the preset's. Under
            ``aggregation: ConstantLength`` the denominator is constant, and both are the same.
        band: Quantiles [low, high] of the entropy, with ``select: band``: the tokens that the top 1 - low holds and the
            top 1 - high does not.
        preset: ``invariant``, ``paper_v2``, ``paper_v1`` or ``trl``.
        source: Entropies of the ``rollout`` engine, of the ``old`` policy, which the phase began with, or of the
            ``current`` one; null: the preset's. An engine that samples from the training weights exactly gives both of
            the first; another is refused for ``rollout``.
        scope: Compare among the tokens of a ``phase``, a ``mini_batch`` or a ``micro_batch``; null: the preset's.
        ranks: Compare over all ranks (``global``) or on each rank alone (``local``); null: the preset's.
        rule: Keep an ``exact`` number, or all that reach the interpolated ``quantile``; null: the preset's.
        stages: Act only in these stages.
        name: Name in logs and checkpoints.

    Raises:
        ValueError: For a ``rho`` outside (0, 1], an unknown word, or options that do not go together.
    """

    def __init__(
        self,
        rho: Schedule | float | None = None,
        select: Literal["top", "bottom", "band", "random"] = "top",
        normalize: Literal["selected", "all"] | None = None,
        band: list[float] | None = None,
        preset: Literal["invariant", "paper_v2", "paper_v1", "trl"] = "invariant",
        source: Literal["rollout", "old", "current"] | None = None,
        scope: Literal["phase", "mini_batch", "micro_batch"] | None = None,
        ranks: Literal["global", "local"] | None = None,
        rule: Literal["exact", "quantile"] | None = None,
        stages: list[str] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(stages, name)
        given: dict[str, Any] = {"source": source, "scope": scope, "ranks": ranks, "normalize": normalize, "rule": rule}
        base = PRESETS.get(preset, PRESETS["invariant"])
        reading = replace(base, **{option: word for option, word in given.items() if word is not None})
        check_choices({**vars(reading), "preset": preset, "select": select, "band": band, "rho": rho})
        self.rho = 0.2 if rho is None else rho
        if bad := [value for value in ends(self.rho) if not 0 < value <= 1]:
            raise ValueError(f"EntropyTopK.rho must lie in (0, 1], got {bad[0]}")
        self.preset, self.select, self.band = preset, select, band
        self.source, self.ranks, self.normalize, self.rule = (
            reading.source, reading.ranks, reading.normalize, reading.rule
        )  # fmt: skip
        self.scope = cast(Scope, reading.scope)
        self.reads_current = self.source == "current"
        self.own_denominator = reading.own_denominator or self.normalize == "selected"

    def check(self, module: RLVRModule) -> None:
        if self.source == "rollout" and not engine_is_exact(module):
            raise ValueError(
                f"{self.name} cannot use source: rollout, because {type(module.engine).__name__} does not give the "
                "training policy's entropies here; use source: old"
            )
        if self.reads_current and self.scope == "mini_batch" and module.batch.steps_per_phase > 1:
            log.info("%s: a scoring pass before each optimiser step of a phase but the first", self.name)

    def assign(self, credit: Credit, rollout: RolloutBatch, ctx: CreditContext) -> Credit:
        entropies = rollout.entropies
        if self.reads_current:
            assert ctx.current is not None
            entropies = ctx.current.entropies
        eligible, rho = credit.weight > 0, at(self.rho, ctx)
        kept = self._choose(rho, entropies.float(), rollout, eligible, ctx)
        for name, value in describe(kept, eligible, entropies, self.select, ctx.reduce).items():
            ctx.log(name, value)
        if isinstance(self.rho, Schedule):
            ctx.log("rho", rho)
        dropped = eligible & ~kept
        return replace(
            credit,
            weight=credit.weight.masked_fill(dropped, 0.0),
            count=credit.count.masked_fill(dropped, 0.0) if self.normalize == "selected" else credit.count,
        )

    def _choose(
        self, rho: float, entropies: Tensor, rollout: RolloutBatch, eligible: Tensor, ctx: CreditContext
    ) -> Tensor:
        """The tokens to keep [B, T]."""
        reduce = ctx.reduce if self.ranks == "global" else LocalReduce()
        if self.select == "random":
            order = hash_integers(ctx.seed, rollout.uid[:, :1], rollout.token_order()) & LARGEST
            return _first(order, rollout, eligible, rho, reduce)
        score = -entropies if self.select == "bottom" else entropies

        def highest(part: float) -> Tensor:
            if self.rule == "quantile":
                return eligible & (score >= quantile(score, eligible, 1 - part, reduce))
            return _first(sortable(score), rollout, eligible, part, reduce)

        if self.band is None:
            return highest(rho)
        low, high = self.band
        return highest(1 - low) & ~highest(1 - high) if high < 1 else highest(1 - low)


def _first(order: Tensor, rollout: RolloutBatch, eligible: Tensor, part: float, reduce: Reduce) -> Tensor:
    """Exactly ``part`` of the eligible tokens, largest ``order`` first, ties by position and uid [B, T]."""
    total = int(reduce.sum(eligible.sum()))
    return top_k([order, LARGEST - rollout.token_order()], eligible, share(part, total), reduce)
