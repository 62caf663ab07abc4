"""Sharing groups between ranks: which are used, where they go, and that nothing is lost on the way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rollouts import ThreadedReduce, random_rollout, run_ranks
from torch import Tensor

from lit_rlvr.exchange import plan, share_groups
from lit_rlvr.reduce import LocalReduce
from lit_rlvr.types import RolloutBatch

few = settings(max_examples=50, deadline=None, derandomize=True)


@st.composite
def kept_draws(draw: st.DrawFn, ranks: st.SearchStrategy[int]) -> list[list[int]]:
    """For each rank the draws that it kept: any, in any order; a rank may have none."""
    numbers = draw(st.lists(st.integers(0, 40), unique=True, max_size=12))
    lists: list[list[int]] = [[] for _ in range(draw(ranks))]
    for number in numbers:
        lists[draw(st.integers(0, len(lists) - 1))].append(number)
    return lists


def members(placed: dict[int, tuple[int, int]], number: int) -> dict[int, int]:
    """The groups of one mini-batch with their ranks."""
    return {draw: rank for draw, (batch, rank) in placed.items() if batch == number}


@few
@given(kept_draws(st.integers(1, 4)), st.integers(1, 12), st.integers(1, 4))
def test_laws_of_the_plan(draws: list[list[int]], wanted: int, minibatches: int) -> None:
    """The first ``wanted`` by drawing order, each once; mini-batches are runs of that order, ranks even within 1."""
    placed = plan(draws, wanted, minibatches)
    used = sorted(d for own in draws for d in own)[:wanted]
    assert list(placed) == used
    assert [number for number, _ in placed.values()] == sorted(number for number, _ in placed.values())
    sizes = [len(members(placed, number)) for number in range(minibatches)]
    assert sum(sizes) == len(used)
    assert max(sizes) - min(sizes) <= 1
    for number in range(minibatches):
        ranks = list(members(placed, number).values())
        counts = [ranks.count(rank) for rank in range(len(draws))]
        assert max(counts) - min(counts) <= 1


@few
@given(kept_draws(st.integers(1, 4)), st.integers(1, 12), st.integers(1, 4))
def test_mini_batches_do_not_depend_on_the_ranks(draws: list[list[int]], wanted: int, minibatches: int) -> None:
    """One process has the same groups in the same mini-batches."""
    alone = plan([[d for own in draws for d in own]], wanted, minibatches)
    together = plan(draws, wanted, minibatches)
    assert {d: number for d, (number, _) in together.items()} == {d: number for d, (number, _) in alone.items()}


@few
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.randoms(use_true_random=False))
def test_nothing_moves_when_shares_are_equal(ranks: int, each: int, minibatches: int, rng: Any) -> None:
    """Every mini-batch has ``each`` groups on every rank, in any order."""
    home: list[int] = []
    for _ in range(minibatches):
        home += rng.sample([rank for rank in range(ranks) for _ in range(each)], ranks * each)
    draws = [[d for d, h in enumerate(home) if h == rank] for rank in range(ranks)]
    assert {d: rank for d, (_, rank) in plan(draws, len(home), minibatches).items()} == dict(enumerate(home))


@few
@given(kept_draws(st.integers(1, 4)), st.integers(1, 12), st.integers(1, 4))
def test_no_group_moves_into_a_place_that_another_leaves(draws: list[list[int]], wanted: int, minibatches: int) -> None:
    """Within a mini-batch a rank gives groups away or gets some, never both."""
    home = {d: rank for rank, own in enumerate(draws) for d in own}
    placed = plan(draws, wanted, minibatches)
    for number in range(minibatches):
        moves = {d: rank for d, rank in members(placed, number).items() if rank != home[d]}
        assert not {home[d] for d in moves} & set(moves.values())


def test_nothing_moves_when_balanced_within_one() -> None:
    """Rank 1 holds two of three groups: that is as even as it gets."""
    assert plan([[0], [1, 2]], 3, 1) == {0: (0, 0), 1: (0, 1), 2: (0, 1)}


def test_by_hand() -> None:
    """Draw 9 is left over; 5 moves to the rank without groups in the second half."""
    assert plan([[0, 3, 4, 5], [1, 9]], wanted=5, minibatches=2) == {
        0: (0, 0), 1: (0, 1),
        3: (1, 0), 4: (1, 0), 5: (1, 1),
    }  # fmt: skip
    assert plan([[], [6, 2], []], wanted=9, minibatches=1) == {2: (0, 1), 6: (0, 0)}
    assert plan([[], []], wanted=4, minibatches=2) == {}


def contents(rollout: RolloutBatch, number: Tensor) -> list[tuple[Any, ...]]:
    """One tuple per row, in order: its mini-batch and everything about it, without padding."""
    rows: list[tuple[Any, ...]] = []
    for i in range(len(rollout)):
        prompt, response = rollout.prompt_mask[i], rollout.response_mask[i]
        tokens = [t[i][response].tolist() for t in (rollout.response_ids, rollout.old_logprobs, rollout.entropies)]
        facts = [t[i].tolist() for t in (rollout.rewards, rollout.correct, rollout.group, rollout.truncated)]
        rows.append((rollout.uid[i].tolist(), int(number[i]), rollout.prompt_ids[i][prompt].tolist(), tokens, facts,
                     rollout.texts[i]))  # fmt: skip
    return rows


@pytest.mark.parametrize("ranks", [1, 2, 3])
@few
@given(seed=st.integers(0, 999), wanted=st.integers(1, 6), minibatches=st.integers(1, 3), data=st.data())
def test_every_row_arrives_as_it_was(ranks: int, seed: int, wanted: int, minibatches: int, data: st.DataObject) -> None:
    """Together the ranks have what one process has, with groups whole, in drawing order, even in each mini-batch."""
    sizes = [2] * data.draw(st.integers(1, 6))
    homes = data.draw(st.lists(st.integers(0, ranks - 1), min_size=len(sizes), max_size=len(sizes)))
    everything = random_rollout(sizes, 5, seed)
    everything = everything.rows(torch.argsort(everything.group, stable=True))
    place = dict(zip(everything.group.unique().tolist(), homes, strict=True))

    def own(rank: int) -> RolloutBatch:
        rows = [i for i, d in enumerate(everything.group.tolist()) if place[d] == rank]
        return everything.rows(torch.tensor(rows, dtype=torch.int64))

    parts = run_ranks(ranks, lambda reduce: share_groups(own(reduce.rank), wanted, minibatches, reduce))
    alone, number, left_over = share_groups(everything, wanted, minibatches, LocalReduce())
    assert sorted(row for part in parts for row in contents(*part[:2])) == sorted(contents(alone, number))
    assert len(alone) == 2 * min(wanted, len(sizes))
    assert [part[2] for part in parts] == [left_over] * ranks
    assert left_over == max(0, len(sizes) - wanted)
    for rollout, _, _ in parts:
        assert rollout.group.tolist() == sorted(rollout.group.tolist())
    for batch in range(minibatches):
        counts = [int((numbers == batch).sum()) // 2 for _, numbers, _ in parts]
        assert max(counts) - min(counts) <= 1


def test_samples_of_a_group_keep_their_order() -> None:
    """Also on the rank that it moves to."""
    rollout = random_rollout([3, 3], 4, seed=5)
    rollout = rollout.rows(torch.argsort(rollout.group, stable=True))

    def rank(reduce: ThreadedReduce) -> RolloutBatch:
        own = rollout if reduce.rank == 1 else rollout.rows(torch.zeros(0, dtype=torch.int64))
        return share_groups(own, 2, 1, reduce)[0]

    parts = run_ranks(2, rank)
    assert torch.equal(torch.cat([part.uid for part in parts]).sort(0).values, rollout.uid.sort(0).values)
    assert [part.uid[:, 2].tolist() for part in parts] == [[0, 1, 2]] * 2


def test_groups_that_stay_do_not_travel() -> None:
    """Only the group that changes rank is sent, and nothing at all where none does."""
    rollout = random_rollout([2, 2, 2, 2], 3, seed=1)
    rollout = rollout.rows(torch.argsort(rollout.group, stable=True))
    draws = rollout.group.unique().tolist()

    def sent(homes: list[int]) -> list[list[Any]]:
        def rank(reduce: ThreadedReduce) -> list[Any]:
            values: list[Any] = []
            gather, mine = reduce.gather, {d for d, h in zip(draws, homes, strict=True) if h == reduce.rank}
            reduce.gather = lambda value: values.append(value) or gather(value)  # type: ignore[method-assign, func-returns-value]
            rows = torch.tensor([i for i, d in enumerate(rollout.group.tolist()) if d in mine])
            share_groups(rollout.rows(rows), 4, 1, reduce)
            return [value.group.unique().tolist() for value in values if isinstance(value, RolloutBatch)]

        return run_ranks(2, rank)

    assert sent([0, 1, 0, 1]) == [[], []]
    assert sent([0, 0, 0, 1]) == [[[draws[2]]], [[]]]
