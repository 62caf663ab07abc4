"""One rollout phase: sample, verify, score, assign credit, and cut into the mini-batches of its optimiser steps."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lit_rlvr.blame import blame
from lit_rlvr.collect import rest
from lit_rlvr.credit import CreditContext, assign_credit, observe, shape_rewards
from lit_rlvr.credit_laws import check_shape
from lit_rlvr.critic import score_values
from lit_rlvr.exchange import share_groups
from lit_rlvr.gae import GAE
from lit_rlvr.minibatch import MiniBatch
from lit_rlvr.reduce import Reduce, extremes, mean
from lit_rlvr.scoring import engine_is_exact, score
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
        made: The context that credit was assigned in.
    """

    number: int
    minibatches: list[MiniBatch]
    metrics: dict[str, float]
    rollout: RolloutBatch
    credit: Credit
    ready: float
    made: CreditContext

    def context(self, update: int) -> CreditContext:
        """A fresh context for what callbacks do in optimiser step ``update``."""
        return replace(self.made, update=update, metrics={}, _times={}, _logged=set())


def run_phase(module: RLVRModule, number: int, reduce: Reduce) -> Phase:
    """Run rollout phase ``number`` of ``module``; every rank calls it."""
    batch, seconds = module.batch, dict[str, float]()
    started = time.perf_counter()
    first = None
    if module.ahead is not None:
        module.ahead.wait(reduce)
        first = module.ahead.take(module.trainer.global_step)
    module.engine.sync(module.policy, module.trainer.global_step, reduce)
    own, tally = module.collector.collect(module.policy, module.data.draw, batch.prompts, number, reduce, first)
    rest(module.engine, reduce)
    if module.ahead is not None:
        module.ahead.begin(module, number + 1, reduce)
    rollout, owner, surplus = share_groups(own, batch.prompts, batch.minibatches, reduce)
    with _timed(seconds, "time/score_s"):
        rollout, own_old = _score(module, rollout, reduce)
    ctx = CreditContext(step=number, update=module.trainer.global_step, reduce=reduce, seed=module.seed)
    with _timed(seconds, "time/credit_s"):
        observe(module.chain, rollout, ctx)
        rewards = token_rewards(module, replace(rollout, rewards=shape_rewards(module.chain, rollout, ctx)))
        rollout = replace(rollout, rewards=rewards.sum(-1))
        base, returns = base_credit(module, rollout, rewards, reduce)
        credit = assign_credit(module.chain, rollout, base, ctx)
        minibatches = into_mini_batches(module, rollout, credit, returns, owner, own_old, reduce)
    metrics = tally.read(reduce) | seconds | ctx.metrics | module.engine.metrics(reduce)
    metrics["rollout/surplus_groups"] = float(surplus)
    metrics["rollout/shaped_reward"] = mean(reduce, rollout.rewards)
    metrics["credit/kept_fraction"] = mean(reduce, (credit.weight > 0)[rollout.response_mask])
    if module.ahead is not None:
        metrics |= module.ahead.metrics(tally, reduce)
    metrics["time/phase_s"] = time.perf_counter() - started
    metrics["rollout/tokens_per_s"] = metrics["rollout/tokens"] / max(metrics["time/generate_s"], 1e-9)
    metrics |= by_sign(rollout, base, reduce) if tally.entropies or not own_old else {}
    metrics |= engine_mismatch(rollout, reduce)
    if not tally.entropies and not own_old:
        metrics["rollout/entropy"] = mean(reduce, rollout.entropies, rollout.response_mask)
    return Phase(number, minibatches, metrics, rollout, credit, time.perf_counter(), ctx)


def token_rewards(module: RLVRModule, rollout: RolloutBatch) -> Tensor:
    """Rewards of single tokens [B, T]: the response's at its last, less overlong penalty there and KL at each token."""
    rewards, mask = rollout.rewards, rollout.response_mask
    if module.overlong is not None:
        rewards = rewards + module.overlong(rollout.lengths, module.sampling.max_new_tokens)
    last = mask & (torch.arange(mask.shape[1], device=mask.device) == rollout.lengths[:, None] - 1)
    spread = last * rewards[:, None]
    if module.kl is not None and module.kl.where == "reward":
        assert rollout.ref_logprobs is not None
        spread = spread - module.kl.beta * module.kl(rollout.old_logprobs, rollout.ref_logprobs) * mask
    return spread


def base_credit(
    module: RLVRModule, rollout: RolloutBatch, rewards: Tensor, reduce: Reduce
) -> tuple[Credit, Tensor | None]:
    """The algorithm's own credit, in which every response token learns, and the critic's returns [B, T].

    Args:
        module: The algorithm.
        rollout: The facts; its rewards are those that learning maximises.
        rewards: The same, token by token [B, T].
        reduce: Reaches the other ranks.

    Raises:
        ValueError: When advantage or aggregation raise, or return another shape; the message names them.
    """
    mask, returns = rollout.response_mask, None
    if isinstance(module.advantage, GAE):
        assert rollout.values is not None
        with blame(module.advantage, "of_tokens"):
            advantage, returns = module.advantage.of_tokens(rewards, rollout.values, mask, reduce)
    else:
        with blame(module.advantage, "__call__"):
            each = module.advantage(rollout.rewards, rollout.group, reduce)
        check_shape(each, rollout.rewards, f"{type(module.advantage).__name__} returned")
        advantage = each[:, None] * mask
    with blame(module.aggregation, "share"):
        share = module.aggregation.share(mask)
    check_shape(share, mask, f"{type(module.aggregation).__name__}.share returned")
    return Credit(advantage, share, share.clone()), returns


def into_mini_batches(
    module: RLVRModule,
    rollout: RolloutBatch,
    credit: Credit,
    returns: Tensor | None,
    owner: Tensor,
    own_old: bool,
    reduce: Reduce,
) -> list[MiniBatch]:
    """Cut a rank's rows into mini-batches by ``owner`` [B], each with its denominators over all ranks."""
    minibatches = []
    for number in range(module.batch.minibatches):
        rows = (owner == number).nonzero().squeeze(-1)
        target = None if returns is None else returns[rows]
        facts, own = rollout.rows(rows), credit.rows(rows)
        options = {"own_old": own_old, "engine_old": own_old}
        minibatches.append(MiniBatch.of(facts, own, module.aggregation, reduce, returns=target, **options))
    return minibatches


def by_sign(rollout: RolloutBatch, base: Credit, reduce: Reduce) -> dict[str, float]:
    """Mean entropy of tokens in positive and in negative samples, by the sign of the base advantage."""
    positive, negative = base.advantage > 0, base.advantage < 0
    return {
        "credit/entropy_positive": mean(reduce, rollout.entropies, positive),
        "credit/entropy_negative": mean(reduce, rollout.entropies, negative),
    }


def engine_mismatch(rollout: RolloutBatch, reduce: Reduce) -> dict[str, float]:
    """How far the engine's probabilities are from the training model's: mean and extremes of their ratio."""
    if rollout.engine_logprobs is None:
        return {}
    log_ratio, mask = (rollout.old_logprobs - rollout.engine_logprobs).double(), rollout.response_mask
    smallest, largest = extremes(reduce, log_ratio, mask)
    return {
        "rollout/engine_ratio": mean(reduce, log_ratio.exp(), mask),
        "rollout/engine_ratio_max": math.exp(largest),
        "rollout/engine_ratio_min": math.exp(smallest),
    }


def _score(module: RLVRModule, rollout: RolloutBatch, reduce: Reduce) -> tuple[RolloutBatch, bool]:
    """Fill in log-probabilities that the engine could not give exactly, and the reference model's.

    Returns the rollout, and whether the training forward's own log-probabilities serve as the old ones: a phase with
    one update has not left the old policy yet, so unless something reads them before, no pass is needed. The rollout's
    are the engine's then, and are only compared with those of the training forward.
    """
    temperature, budget = module.sampling.temperature, module.batch.micro_tokens
    exact = engine_is_exact(module)
    read_before = bool(module.chain) or (module.kl is not None and module.kl.where == "reward")
    own_old = not exact and module.batch.steps_per_phase == 1 and not read_before
    if not exact and not own_old:
        logprobs, entropies = score(module.policy, rollout, temperature, budget, reduce)
        rollout = replace(rollout, old_logprobs=logprobs, entropies=entropies, engine_logprobs=rollout.old_logprobs)
    if module.reference is not None:
        ref_logprobs, _ = score(module.reference, rollout, temperature, budget, reduce)
        rollout = replace(rollout, ref_logprobs=ref_logprobs)
    if module.critic is not None:
        values = score_values(module.critic, rollout, budget, module.device, reduce)
        rollout = replace(rollout, values=values)
    return rollout, own_old


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - started
