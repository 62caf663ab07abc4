"""One rollout phase: sample, verify, score, assign credit, and cut into the mini-batches of its optimiser steps."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lit_rlvr.credit import CreditContext, all_callbacks, assign_credit, credit_chain
from lit_rlvr.exchange import share_groups
from lit_rlvr.objective import MiniBatch
from lit_rlvr.reduce import Reduce, mean
from lit_rlvr.scoring import score
from lit_rlvr.sharding import compute_precision
from lit_rlvr.types import Credit, RolloutBatch

if TYPE_CHECKING:
    from lit_rlvr.module import RLVRModule


@dataclass(frozen=True)
class Phase:
    """A phase that is ready to be learnt from.

    Args:
        number: Rollout phases before this one.
        minibatches: One per optimiser step of one epoch.
        metrics: What to log about it; the same on every rank.
        rollout: This rank's facts, before they were cut.
        credit: This rank's credit, before it was cut.
        ready: When learning could begin, in the seconds of ``time.perf_counter``.
    """

    number: int
    minibatches: list[MiniBatch]
    metrics: dict[str, float]
    rollout: RolloutBatch
    credit: Credit
    ready: float


def run_phase(module: RLVRModule, number: int, reduce: Reduce) -> Phase:
    """Run rollout phase ``number`` of ``module``; every rank calls it."""
    batch, seconds = module.batch, dict[str, float]()
    started = time.perf_counter()
    own, tally = module.collector.collect(module.policy, module.data.draw, batch.prompts, number, reduce)
    rollout, owner, surplus = share_groups(own, batch.prompts, batch.minibatches, reduce)
    with _timed(seconds, "time/score_s"):
        rollout, own_old = _score(module, rollout, reduce)
    rollout = replace(rollout, rewards=shape_rewards(module, rollout))
    with _timed(seconds, "time/credit_s"):
        ctx = CreditContext(step=number, update=module.trainer.global_step, reduce=reduce, seed=module.seed)
        chain = credit_chain(all_callbacks(module.trainer))
        credit = assign_credit(chain, rollout, base_credit(module, rollout), ctx)
        minibatches = cut(module, rollout, credit, owner, own_old, reduce)
    metrics = tally.read(reduce) | seconds | ctx.metrics
    metrics["rollout/surplus_groups"] = float(surplus)
    metrics["rollout/shaped_reward"] = mean(reduce, rollout.rewards)
    metrics["credit/kept_fraction"] = mean(reduce, (credit.weight > 0)[rollout.response_mask])
    metrics["time/phase_s"] = time.perf_counter() - started
    metrics["rollout/tokens_per_s"] = metrics["rollout/tokens"] / max(metrics["time/generate_s"], 1e-9)
    return Phase(number, minibatches, metrics, rollout, credit, time.perf_counter())


def shape_rewards(module: RLVRModule, rollout: RolloutBatch) -> Tensor:
    """Rewards [B] after the overlong penalty and the KL penalty, where the algorithm has them."""
    rewards = rollout.rewards
    if module.overlong is not None:
        rewards = rewards + module.overlong(rollout.lengths, module.sampling.max_new_tokens)
    if module.kl is not None and module.kl.where == "reward":
        assert rollout.ref_logprobs is not None
        penalty = module.kl(rollout.old_logprobs, rollout.ref_logprobs) * rollout.response_mask
        rewards = rewards - module.kl.beta * penalty.sum(-1)
    return rewards


def base_credit(module: RLVRModule, rollout: RolloutBatch) -> Credit:
    """The algorithm's own credit: one advantage per response, every response token learns."""
    advantage = module.advantage(rollout.rewards, rollout.group)
    share = module.aggregation.share(rollout.response_mask)
    return Credit(advantage[:, None] * rollout.response_mask, share, share.clone())


def cut(
    module: RLVRModule, rollout: RolloutBatch, credit: Credit, owner: Tensor, own_old: bool, reduce: Reduce
) -> list[MiniBatch]:
    """Cut a rank's rows into mini-batches by ``owner`` [B], each with its denominators over all ranks."""
    share = module.aggregation.share(rollout.response_mask)
    minibatches = []
    for number in range(module.batch.minibatches):
        rows = (owner == number).nonzero().squeeze(-1)
        mine = credit.rows(rows)
        own_sums = torch.stack(
            [mine.count.double().sum(), share[rows].double().sum(), torch.tensor(len(rows)).double()]
        )
        count, shares, sequences = reduce.sum(own_sums).tolist()
        denominator = module.aggregation.denominator(count, sequences) if count else 0.0
        kl_denominator = module.aggregation.denominator(shares, sequences)
        minibatches.append(MiniBatch(rollout.rows(rows), mine, denominator, share[rows], kl_denominator, own_old))
    return minibatches


def _score(module: RLVRModule, rollout: RolloutBatch, reduce: Reduce) -> tuple[RolloutBatch, bool]:
    """Fill in log-probabilities that the engine could not give exactly, and the reference model's.

    Returns the rollout, and whether the training forward's own log-probabilities serve as the old ones: a phase with
    one update has not left the old policy yet, so unless something reads them before, no pass is needed.
    """
    temperature, budget = module.sampling.temperature, module.batch.micro_tokens
    precision = compute_precision(module.trainer.strategy, module.dtype_name, str(module.trainer.precision))
    exact = module.engine.exact(precision)
    read_before = bool(credit_chain(all_callbacks(module.trainer))) or (
        module.kl is not None and module.kl.where == "reward"
    )
    own_old = not exact and module.batch.steps_per_phase == 1 and not read_before
    if not exact and not own_old:
        logprobs, entropies = score(module.policy, rollout, temperature, budget, reduce)
        rollout = replace(rollout, old_logprobs=logprobs, entropies=entropies)
    if module.reference is not None:
        ref_logprobs, _ = score(module.reference, rollout, temperature, budget, reduce)
        rollout = replace(rollout, ref_logprobs=ref_logprobs)
    return rollout, own_old


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - started
