"""Credit that is decided in an optimiser step: by callbacks whose ``scope`` is a mini-batch or a micro-batch."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lit_rlvr.credit import CreditContext, assign_credit
from lit_rlvr.microbatch import MicroBatch
from lit_rlvr.minibatch import MiniBatch
from lit_rlvr.scoring import score
from lit_rlvr.types import Credit, Current

if TYPE_CHECKING:
    from lit_rlvr.module import RLVRModule


def of_mini_batch(module: RLVRModule, mini: MiniBatch, ctx: CreditContext, *, moved: bool) -> MiniBatch:
    """Run the callbacks that act on mini-batches; every rank calls it.

    Args:
        module: The module.
        mini: The mini-batch as the phase left it.
        ctx: The step's context.
        moved: Whether the policy has been trained since the phase began; until then it is the old policy, and no
            scoring pass is needed.
    """
    acting = [c for c in module.chain if c.scope == "mini_batch"]
    if not acting:
        return mini
    facts = mini.rollout
    if any(c.reads_current for c in acting):
        logprobs, entropies = facts.old_logprobs, facts.entropies
        if moved:
            budget = module.batch.micro_tokens
            logprobs, entropies = score(module.policy, facts, module.sampling.temperature, budget, module.reduce)
        ctx.current = Current(logprobs, entropies)
    credit = assign_credit(acting, facts, mini.credit, ctx, "mini_batch")
    ctx.current = None
    return mini.with_credit(credit, module.aggregation, module.reduce)


def of_micro_batch(
    module: RLVRModule, mini: MiniBatch, micro: MicroBatch, logprobs: Tensor, entropies: Tensor, ctx: CreditContext
) -> MiniBatch:
    """Run the callbacks that act on micro-batches; every rank calls it, also for an empty one.

    Args:
        module: The module.
        mini: The mini-batch.
        micro: The micro-batch; all response tokens of its rows.
        logprobs: The current policy's log-probabilities of its tokens [m].
        entropies: Its entropies [m].
        ctx: The step's context.

    Returns:
        The mini-batch with the micro-batch's credit in the micro-batch's rows.
    """
    acting = [c for c in module.chain if c.scope == "micro_batch"]
    if not acting:
        return mini
    rows, local = micro.row.unique(return_inverse=True)
    facts, credit = mini.rollout.rows(rows), mini.credit.rows(rows)
    # The one thing in a micro-batch that a GPU is waited for: callbacks look at it on the CPU.
    fetched = torch.stack([logprobs, entropies]).detach().to(facts.old_logprobs)
    seen = torch.zeros(2, *facts.old_logprobs.shape, dtype=fetched.dtype)
    seen[:, local, micro.column] = fetched
    ctx.current = Current(*seen)
    after = assign_credit(acting, facts, credit, ctx, "micro_batch")
    ctx.current = None
    whole = put_rows(mini.credit, rows, after)
    if any(c.own_denominator and c.acts(ctx) for c in acting):
        return replace(mini, credit=whole, denominator=mini.denominator_of(after, module.aggregation))
    return replace(mini, credit=whole)


def put_rows(credit: Credit, rows: Tensor, part: Credit) -> Credit:
    """``credit`` [B, T] with ``part`` [n, T] in its ``rows`` [n]."""

    def put(whole: Tensor, piece: Tensor) -> Tensor:
        return whole.index_copy(0, rows, piece.to(whole))

    kl_coef = credit.kl_coef
    if part.kl_coef is not None:
        kl_coef = put(torch.zeros_like(credit.weight) if kl_coef is None else kl_coef, part.kl_coef)
    return Credit(
        put(credit.advantage, part.advantage), put(credit.weight, part.weight), put(credit.count, part.count), kl_coef
    )
