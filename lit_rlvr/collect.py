"""Sampling and verifying the groups of a rollout phase, with dynamic sampling."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lit_rlvr.engines import Engine, Generation, Sampling
from lit_rlvr.policy import Policy
from lit_rlvr.reduce import Reduce, on_every_rank
from lit_rlvr.shaping import DynamicSampling
from lit_rlvr.tasks import Score
from lit_rlvr.types import EncodedPrompt, RolloutBatch
from lit_rlvr.verify import Verifier

log = logging.getLogger(__name__)


SUMMED = (
    "responses", "tokens", "reward", "correct", "truncated", "entropy", "failures", "groups", "all_right", "all_wrong",
)  # fmt: skip


@dataclass(frozen=True)
class Responses:
    """What an engine sampled for a round's prompts.

    Args:
        prompts: The prompts that this rank asked for.
        uid: (phase, draw, sample) of every response [B, 3].
        out: The responses.
        seconds: What sampling took.
        lag: Optimiser steps since the weights that they were sampled with.
    """

    prompts: Sequence[EncodedPrompt]
    uid: Tensor
    out: Generation
    seconds: float
    lag: int = 0


@dataclass
class Tally:
    """What happened while sampling, summed over the rounds of a phase on this rank."""

    sums: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    rounds: int = 0
    usable: int = 0
    reward_names: tuple[str, ...] = ()
    entropies: bool = True
    """Whether the engine tells them; else they are not known before a scoring pass."""

    def add(self, rollout: RolloutBatch, failures: int, scores: Sequence[Score] = ()) -> None:
        mask = rollout.response_mask
        facts: dict[str, Any] = {
            "responses": len(rollout),
            "tokens": mask.sum(),
            "reward": rollout.rewards.double().sum(),
            "correct": rollout.correct.sum(),
            "truncated": rollout.truncated.sum(),
            "entropy": rollout.entropies[mask].double().sum(),
            "failures": failures,
        }
        for group in rollout.group.unique():
            share = float(rollout.correct[rollout.group == group].mean())
            self.sums["groups"] += 1
            self.sums["all_right"] += share == 1
            self.sums["all_wrong"] += share == 0
        facts |= {f"reward_{n}": sum(s.parts.get(n, 0.0) for s in scores) for n in self.reward_names}
        for name, value in facts.items():
            self.sums[name] += float(value)

    def read(self, reduce: Reduce) -> dict[str, float]:
        """Means over all ranks, as ``rollout/...`` and ``time/...``."""
        parts = tuple(f"reward_{n}" for n in self.reward_names)
        own = torch.tensor([self.sums[n] for n in SUMMED + parts], dtype=torch.float64)
        total = dict(zip(SUMMED + parts, reduce.sum(own).tolist(), strict=True))
        per_response, per_group = max(total["responses"], 1.0), max(total["groups"], 1.0)
        metrics = {f"rollout/{n}": total[n] / per_response for n in ("reward", *parts, "correct", "truncated")}
        metrics |= {f"rollout/groups_{n}": total[n] / per_group for n in ("all_right", "all_wrong")}
        metrics |= {
            "rollout/length": total["tokens"] / per_response,
            "rollout/tokens": total["tokens"],
            "rollout/prompts": total["groups"],
            "rollout/verifier_failures": total["failures"],
            "rollout/rounds": float(self.rounds),
            "rollout/usable_groups": float(self.usable),
        }
        if self.entropies:
            metrics["rollout/entropy"] = total["entropy"] / max(total["tokens"], 1.0)
        return metrics | {f"time/{name}_s": seconds for name, seconds in self.seconds.items()}


class Collector:
    """Samples groups until enough are usable.

    Args:
        engine: Samples responses.
        verifier: Scores them.
        tokenizer: Decodes them.
        sampling: How they are drawn.
        samples: Responses per prompt.
        filter: Dynamic sampling, or None to keep every group.
        seed: The run's seed.
    """

    def __init__(
        self,
        engine: Engine,
        verifier: Verifier,
        tokenizer: Any,
        sampling: Sampling,
        samples: int,
        filter: DynamicSampling | None,
        seed: int,
    ) -> None:
        self.engine, self.verifier, self.tokenizer = engine, verifier, tokenizer
        self.sampling, self.samples, self.filter, self.seed = sampling, samples, filter, seed

    def collect(
        self,
        policy: Policy,
        draw: Callable[[int], list[EncodedPrompt]],
        wanted: int,
        phase: int,
        reduce: Reduce,
        first: Responses | None = None,
    ) -> tuple[RolloutBatch, Tally]:
        """Sample this rank's share of a phase.

        Args:
            policy: The current policy.
            draw: Gives the next training prompts, the same on every rank.
            wanted: Usable groups to aim for, over all ranks.
            phase: Number of the rollout phase.
            reduce: Counts the usable groups.
            first: This rank's responses of the first round, if they have been sampled ahead.

        Returns:
            The usable groups that this rank sampled (on the CPU), and what happened.

        Raises:
            Exception: On every rank, what went wrong on one while it sampled or verified.
        """
        tally, kept = Tally(reward_names=self.verifier.task.reward_names), list[RolloutBatch]()
        drawn = usable = 0
        while usable < wanted and tally.rounds < (self.filter.max_rounds if self.filter else 1):
            prompts = draw(self._ask(wanted - usable, usable, drawn, wanted))
            mine, draws = self.share(prompts, drawn, reduce)
            drawn += len(prompts)
            tally.rounds += 1
            assert first is None or first.prompts == mine, "prompts that were looked at are those that are drawn next"
            round = partial(self._round, tally, kept, first, policy, mine, draws, phase)
            usable, first = usable + sum(on_every_rank(round, reduce)), None
        if not usable and reduce.rank == 0:
            log.warning(
                "phase %d: all %d sampled groups are all right or all wrong; its optimiser steps are skipped",
                phase,
                drawn,
            )
        tally.usable = usable
        return RolloutBatch.concatenate(kept), tally

    def _round(self, tally: Tally, kept: list[RolloutBatch], first: Responses | None, *asked: Any) -> int:
        """Sample, unless ``first`` has been, and verify; put the usable groups among the kept, and count them."""
        rollout = self.verify(first or self.ask(*asked), tally)
        if self.filter is not None:
            rollout = rollout.rows(self.filter.mixed(rollout.correct, rollout.group).nonzero().squeeze(-1))
        kept.append(rollout)
        return len(rollout) // self.samples

    def _ask(self, missing: int, usable: int, drawn: int, wanted: int) -> int:
        """Prompts to draw next: what is missing, at the rate of usable groups so far, and never above a full batch."""
        if not drawn:
            return wanted
        return min(wanted, -(-missing * drawn // max(usable, 1)))

    def share(
        self, prompts: Sequence[EncodedPrompt], drawn: int, reduce: Reduce
    ) -> tuple[list[EncodedPrompt], list[int]]:
        """Which of ``prompts``, drawn after ``drawn`` others of the phase, are this rank's, and their draws."""
        draws = [d for d in range(drawn, drawn + len(prompts)) if d % reduce.world_size == reduce.rank]
        return [prompts[d - drawn] for d in draws], draws

    def ask(self, policy: Policy, prompts: Sequence[EncodedPrompt], draws: Sequence[int], phase: int) -> Responses:
        """Have the engine sample the groups of ``prompts``, which are the phase's ``draws``."""
        rows = [(phase, d, s) for d in draws for s in range(self.samples)]
        uid = torch.tensor(rows, dtype=torch.int64).view(-1, 3)
        started = time.perf_counter()
        out = self.engine.generate(policy, self.tokenizer, [p.tokens for p in prompts], uid, self.sampling, self.seed)
        return Responses(prompts, uid, out, time.perf_counter() - started)

    def verify(self, responses: Responses, tally: Tally) -> RolloutBatch:
        """Score responses, and put the facts together."""
        n, prompts, out = self.samples, responses.prompts, responses.out
        tally.seconds["generate"] += responses.seconds
        tally.sums["lag"] += responses.lag * len(responses.uid)
        tally.entropies = out.entropies is not None
        each = tuple(p.prompt for p in prompts for _ in range(n))
        texts = decode(self.tokenizer, out)
        started = time.perf_counter()
        verdicts = self.verifier(each, texts)
        tally.seconds["verify"] += time.perf_counter() - started
        rollout = to_rollout(prompts, n, responses.uid, out, verdicts.scores, texts)
        tally.add(rollout, verdicts.failures.total(), verdicts.scores)
        return rollout


def rest(engine: Engine, reduce: Reduce) -> None:
    """Tell the engine that sampling is over; every rank calls it, and what goes wrong on one is raised on all."""
    on_every_rank(partial(engine.rest, reduce), reduce)


def decode(tokenizer: Any, out: Generation) -> tuple[str, ...]:
    """The texts of a generation, without special tokens."""
    lengths = out.mask.sum(-1).tolist()
    rows = [row[:length] for row, length in zip(out.ids.tolist(), lengths, strict=True)]
    return tuple(tokenizer.batch_decode(rows, skip_special_tokens=True)) if rows else ()


def to_rollout(
    prompts: Sequence[EncodedPrompt],
    samples: int,
    uid: Tensor,
    out: Generation,
    scores: Sequence[Score],
    texts: tuple[str, ...],
) -> RolloutBatch:
    """Put the facts of a generation together, on the CPU."""
    width = max((len(p.tokens) for p in prompts), default=1)
    lengths = torch.tensor([len(p.tokens) for p in prompts], dtype=torch.int64)
    ids = torch.tensor([[*p.tokens, *[0] * (width - len(p.tokens))] for p in prompts], dtype=torch.int64).view(
        -1, width
    )
    mask = torch.arange(width)[None, :] < lengths[:, None]
    logprobs = out.logprobs.float().cpu()
    return RolloutBatch(
        prompt_ids=ids.repeat_interleave(samples, 0),
        prompt_mask=mask.repeat_interleave(samples, 0),
        response_ids=out.ids.cpu(),
        response_mask=out.mask.cpu(),
        old_logprobs=logprobs,
        entropies=torch.zeros_like(logprobs) if out.entropies is None else out.entropies.float().cpu(),
        rewards=torch.tensor([s.reward for s in scores], dtype=torch.float32),
        correct=torch.tensor([float(s.correct) for s in scores], dtype=torch.float32),
        group=uid[:, 1].clone(),
        uid=uid,
        truncated=out.truncated.cpu(),
        prompts=tuple(p.prompt for p in prompts for _ in range(samples)),
        texts=texts,
    )
