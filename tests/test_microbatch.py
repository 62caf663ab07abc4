"""Cutting rows by a token budget, and where the head finds the hidden state of each token."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rollouts import build_rollout, rollouts
from torch import Tensor

from lit_rlvr.layout import Reader
from lit_rlvr.microbatch import empty, lay_out
from lit_rlvr.split import split_rows
from lit_rlvr.types import RolloutBatch

CPU = torch.device("cpu")
few = settings(max_examples=50, deadline=None, derandomize=True)


@few
@given(st.lists(st.integers(0, 30), max_size=12), st.integers(1, 60))
def test_rows_times_longest_stays_within_the_budget(lengths: list[int], budget: int) -> None:
    """Every row once, longest first; a part has one row or fits, and the next row would not have fitted."""
    parts = [part.tolist() for part in split_rows(torch.tensor(lengths, dtype=torch.int64), budget)]
    rows = [row for part in parts for row in part]
    assert sorted(rows) == list(range(len(lengths)))
    assert [lengths[row] for row in rows] == sorted(lengths, reverse=True)
    for i, part in enumerate(parts):
        longest = max(1, *(lengths[row] for row in part))
        assert len(part) == 1 or len(part) * longest <= budget
        assert i == len(parts) - 1 or (len(part) + 1) * longest > budget


@pytest.mark.parametrize(
    ("budget", "wanted"),
    [(1, [[1], [3], [0], [2]]), (6, [[1], [3, 0], [2]]), (8, [[1], [3, 0], [2]]), (99, [[1, 3, 0, 2]])],
)
def test_split_by_hand(budget: int, wanted: list[list[int]]) -> None:
    """Rows of 2, 8, 2 and 3 tokens: the longest goes alone even if it is over the budget; equals keep their order."""
    assert [part.tolist() for part in split_rows(torch.tensor([2, 8, 2, 3]), budget)] == wanted


def naive(rollout: RolloutBatch, rows: list[int], chosen: Tensor) -> tuple[list[list[int]], list[tuple[int, ...]]]:
    """Sequences up to the last state that is needed, and for each chosen token its place, target, row and column."""
    sequences: list[list[int]] = []
    tokens: list[tuple[int, ...]] = []
    for place, row in enumerate(rows):
        prompt = [int(x) for x, m in zip(rollout.prompt_ids[row], rollout.prompt_mask[row], strict=True) if m]
        response = [int(x) for x, m in zip(rollout.response_ids[row], rollout.response_mask[row], strict=True) if m]
        last = max((column for column in range(len(response)) if chosen[row, column]), default=0)
        sequences.append(prompt + response[:last])
        for column, token in enumerate(response):
            if chosen[row, column]:
                tokens.append((place, len(prompt) + column - 1, token, row, column))
    return sequences, tokens


@few
@given(rollouts(), st.randoms(use_true_random=False), st.integers(0, 999))
def test_lay_out_against_loops(rollout: RolloutBatch, rng: object, seed: int) -> None:
    """Any rows in any order, any tokens: prompt and response side by side, each target one place after its state."""
    generator = torch.Generator().manual_seed(seed)
    count = 1 + seed % len(rollout)
    rows = torch.randperm(len(rollout), generator=generator)[:count]
    chosen = rollout.response_mask & (torch.rand(rollout.response_mask.shape, generator=generator) < 0.6)
    micro = lay_out(rollout, rows, chosen, Reader(CPU))
    sequences, tokens = naive(rollout, rows.tolist(), chosen)
    width = max(map(len, sequences))
    assert micro.ids.tolist() == [s + [0] * (width - len(s)) for s in sequences]
    columns = (micro.index // width, micro.index % width, micro.targets, micro.row, micro.column)
    assert list(zip(*(c.tolist() for c in columns), strict=True)) == tokens
    # The law itself: the token after the state is the target where it enters, and the rollout has it at (row, column).
    followed = [place + 1 < len(sequences[sequence]) for sequence, place, *_ in tokens]
    assert torch.equal(micro.ids.flatten()[micro.index[followed] + 1], micro.targets[followed])
    assert torch.equal(rollout.response_ids[micro.row, micro.column], micro.targets)
    assert {t.dtype for t in (micro.ids, micro.index, micro.targets, micro.row, micro.column)} == {torch.int64}


def test_lay_out_by_hand() -> None:
    """Prompts of 1 and 2 tokens, responses of 2 and 1: the last row first."""
    rollout = build_rollout([[0.5, 0.5], [0.5]])
    micro = lay_out(rollout, torch.tensor([1, 0]), rollout.response_mask, Reader(CPU))
    assert micro.ids.tolist() == [[11, 21], [10, 30]]
    assert micro.index.tolist() == [1, 2, 3]
    assert micro.targets.tolist() == [130, 30, 31]
    assert micro.row.tolist() == [1, 0, 0]
    assert micro.column.tolist() == [0, 0, 1]


def test_nothing_chosen() -> None:
    """The rows' prompts are still there."""
    rollout = build_rollout([[0.5, 0.5], [0.5]])
    micro = lay_out(rollout, torch.tensor([0, 1]), torch.zeros_like(rollout.response_mask), Reader(CPU))
    assert micro.ids.tolist() == [[10, 0], [11, 21]]
    assert [t.tolist() for t in (micro.index, micro.targets, micro.row, micro.column)] == [[]] * 4


def test_empty_has_one_token_and_nothing_to_learn() -> None:
    """One place to run a forward pass on, no targets; integers, as an embedding needs."""
    micro = empty(CPU)
    assert micro.ids.tolist() == [[0]]
    assert [t.tolist() for t in (micro.index, micro.targets, micro.row, micro.column)] == [[]] * 4
    assert {t.dtype for t in (micro.ids, micro.index, micro.targets, micro.row, micro.column)} == {torch.int64}
