"""Rollouts and credit made up for tests, hypothesis strategies for them, and several ranks inside one process."""

from __future__ import annotations

import pickle
import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import pad

from lit_rlvr.credit import CreditCallback, CreditContext, assign_credit, observe
from lit_rlvr.types import Credit, Current, RolloutBatch

R = TypeVar("R")
TIED = (0.0, 0.0, 0.5, 1.25)
"""Entropies that come often, so that ties do."""
TEXTS = ("so it is 7", "so it so it so it so it", "boxed{1} boxed{2}", "aaaa", "so \u5b57")
"""A response without defects, and one of each kind at low thresholds."""


def padded(rows: Sequence[Sequence[float]]) -> Tensor:
    """Ragged rows as a float32 tensor [B, T], filled up with zeros on the right."""
    width = max(map(len, rows), default=1)
    return torch.tensor([[*row, *[0.0] * (width - len(row))] for row in rows]).view(len(rows), width)


def build_rollout(
    entropies: Sequence[Sequence[float]],
    logprobs: Sequence[Sequence[float]] | None = None,
    group: Sequence[int] | None = None,
    phase: int = 0,
) -> RolloutBatch:
    """A rollout with these entropies, one list per response; without ``group`` all rows answer prompt 0."""
    rows, values = len(entropies), padded(entropies)
    mask = torch.arange(values.shape[1])[None, :] < torch.tensor([len(r) for r in entropies]).view(-1, 1)
    group = [0] * rows if group is None else list(group)
    uid = [(phase, draw, group[:row].count(draw)) for row, draw in enumerate(group)]
    number = torch.arange(rows)
    return RolloutBatch(
        prompt_ids=number[:, None] + torch.tensor([[10, 20]]),
        prompt_mask=torch.tensor([[True, False], [True, True]])[number % 2],
        response_ids=(number[:, None] * 100 + torch.arange(values.shape[1]) + 30) * mask,
        response_mask=mask,
        old_logprobs=-values if logprobs is None else padded(logprobs),
        entropies=values,
        rewards=(number % 3).float(),
        correct=(number % 3 > 0).float(),
        group=torch.tensor(group, dtype=torch.int64),
        uid=torch.tensor(uid, dtype=torch.int64).view(-1, 3),
        truncated=number % 2 == 0,
        texts=tuple(f"text {draw}.{sample}" for _, draw, sample in uid),
    )


def run_chain(chain: Sequence[CreditCallback], rollout: RolloutBatch, credit: Credit, ctx: CreditContext) -> Credit:
    """What a phase does with a chain: all observe, then each acts."""
    observe(chain, rollout, ctx)
    return assign_credit(chain, rollout, credit, ctx)


def full_credit(rollout: RolloutBatch, advantage: Sequence[float] | None = None) -> Credit:
    """Every response token learns, with its row's advantage (1 unless given)."""
    values = torch.ones(len(rollout)) if advantage is None else torch.tensor(advantage)
    mask = rollout.response_mask.float()
    return Credit(values[:, None] * mask, mask, mask.clone())


def random_rollout(sizes: Sequence[int], longest: int, seed: int, phase: int = 0) -> RolloutBatch:
    """Groups of ``sizes`` responses of 1 to ``longest`` tokens, rows shuffled, many entropies tied."""
    rng = random.Random(seed)
    draws = rng.sample(range(1000), len(sizes))
    group = [draw for draw, size in zip(draws, sizes, strict=True) for _ in range(size)]
    rng.shuffle(group)
    lengths = [rng.randint(1, longest) for _ in group]
    entropies = [[rng.choice((*TIED, rng.uniform(0, 3))) for _ in range(length)] for length in lengths]
    logprobs = [[-rng.expovariate(0.5) for _ in range(length)] for length in lengths]
    rollout = build_rollout(entropies, logprobs, group, phase)
    # In one group of four all are right, in one all are wrong.
    right = torch.tensor([d % 4 == 0 or (d % 4 > 1 and i % 2 == 0) for i, d in enumerate(group)]).float()
    return replace(
        rollout,
        rewards=right,
        correct=right,
        engine_logprobs=(rollout.old_logprobs + rollout.entropies - 1) * rollout.response_mask,
        texts=tuple(TEXTS[d % len(TEXTS)] for d in group),
    )


def current_policy(rollout: RolloutBatch) -> Current:
    """What a policy that has moved away from the old one says of the responses."""
    moved = rollout.old_logprobs * 0.9 + 0.1 * torch.sin(rollout.old_logprobs * 7) - 0.1
    mask = rollout.response_mask
    return Current(moved * mask, rollout.entropies * 0.8 * mask)


def random_credit(rollout: RolloutBatch, seed: int) -> Credit:
    """Advantages of both signs and zero, weights as earlier callbacks may leave them, some of them zero."""
    rng = random.Random(seed)

    def fill(value: Callable[[], float]) -> Tensor:
        filled = [[value() for _ in range(rollout.response_mask.shape[1])] for _ in range(len(rollout))]
        return padded(filled).view_as(rollout.old_logprobs) * rollout.response_mask

    return Credit(
        advantage=fill(lambda: rng.choice((0.0, rng.gauss(0, 1), rng.gauss(0, 1)))),
        weight=fill(lambda: rng.choice((0.0, 1.0, 1.0, 0.25))),
        count=fill(lambda: rng.choice((0.0, 1.0, 1.0))),
    )


@st.composite
def rollouts(draw: st.DrawFn, groups: int = 4, samples: int = 5, longest: int = 6) -> RolloutBatch:
    """Random rollouts of at least one row."""
    sizes = draw(st.lists(st.integers(1, samples), min_size=1, max_size=groups))
    return random_rollout(sizes, draw(st.integers(1, longest)), draw(st.integers(0, 10_000)))


@st.composite
def phases(draw: st.DrawFn) -> tuple[RolloutBatch, Credit]:
    """Random rollouts with credit that other callbacks have been at."""
    rollout = draw(rollouts())
    return rollout, random_credit(rollout, draw(st.integers(0, 10_000)))


def widen(rollout: RolloutBatch, credit: Credit, extra: int) -> tuple[RolloutBatch, Credit]:
    """The same responses with ``extra`` more columns of padding, which holds numbers that must not be read."""

    def more(tensor: Tensor, value: float = 0) -> Tensor:
        return pad(tensor, (0, extra), value=value)

    wide = replace(
        rollout,
        response_ids=more(rollout.response_ids, 7), response_mask=more(rollout.response_mask),
        old_logprobs=more(rollout.old_logprobs, -9.0), entropies=more(rollout.entropies, 9.0),
        engine_logprobs=None if rollout.engine_logprobs is None else more(rollout.engine_logprobs, -4.0),
    )  # fmt: skip
    return wide, Credit(more(credit.advantage), more(credit.weight), more(credit.count))


def narrow(rollout: RolloutBatch, credit: Credit) -> tuple[RolloutBatch, Credit]:
    """The same responses without padding that no row needs; one column at the least."""
    width = max(1, int(rollout.lengths.max()) if len(rollout) else 1)
    names = ("response_ids", "response_mask", "old_logprobs", "entropies", "engine_logprobs")
    cut = {n: v[:, :width] for n in names if (v := getattr(rollout, n)) is not None}
    kl_coef = None if credit.kl_coef is None else credit.kl_coef[:, :width]
    advantage, weight, count = (t[:, :width] for t in (credit.advantage, credit.weight, credit.count))
    return replace(rollout, **cut), Credit(advantage, weight, count, kl_coef)


@dataclass
class Meeting:
    """Where the ranks of one test meet: a barrier, and a slot per rank."""

    barrier: threading.Barrier
    slots: list[Any]


class ThreadedReduce:
    """Reductions between threads. Ranks that do not make the same calls get an error instead of hanging."""

    def __init__(self, rank: int, meeting: Meeting) -> None:
        self.rank, self.world_size, self.meeting = rank, len(meeting.slots), meeting

    def _exchange(self, call: str, value: Any) -> list[Any]:
        self.meeting.slots[self.rank] = (call, value)
        self.meeting.barrier.wait()
        slots = list(self.meeting.slots)
        self.meeting.barrier.wait()
        calls = [call for call, _ in slots]
        if len(set(calls)) > 1:
            raise AssertionError(f"the ranks do not make the same calls: {calls}")
        return [value for _, value in slots]

    def sum(self, value: Tensor) -> Tensor:
        return torch.stack(self._exchange(f"sum {value.dtype}", value)).sum(0)

    def max(self, value: Tensor) -> Tensor:
        return torch.stack(self._exchange(f"max {value.dtype}", value)).amax(0)

    def gather(self, value: Any) -> list[Any]:
        return [pickle.loads(part) for part in self._exchange("gather", pickle.dumps(value))]


def run_ranks(world_size: int, work: Callable[[ThreadedReduce], R], timeout: float = 20.0) -> list[R]:
    """Run ``work`` on every rank at once, one thread each, and return what each rank returned."""
    meeting = Meeting(threading.Barrier(world_size, timeout=timeout), [None] * world_size)

    def rank_work(rank: int) -> R:
        try:
            return work(ThreadedReduce(rank, meeting))
        except BaseException:
            meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(world_size) as threads:
        futures = [threads.submit(rank_work, rank) for rank in range(world_size)]
    errors = [error for future in futures if (error := future.exception()) is not None]
    if errors:
        raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
    return [future.result() for future in futures]
