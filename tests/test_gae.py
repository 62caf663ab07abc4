"""Generalised advantage estimation and whitening: hand-computed numbers, a transcription of the sums, laws."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rollouts import run_ranks
from torch import Tensor
from torch.testing import assert_close

from lit_rlvr.advantages import BatchNormalized, whiten
from lit_rlvr.gae import GAE
from lit_rlvr.reduce import LocalReduce

LAWS = settings(max_examples=40, deadline=None, derandomize=True)
LOCAL = LocalReduce()
NUMBER = st.floats(-3, 3, width=32)
UNIT = st.floats(0, 1)


def f64(rows: Any) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def mask_of(lengths: list[int], width: int) -> Tensor:
    return torch.arange(width)[None, :] < torch.tensor(lengths)[:, None]


def test_by_hand() -> None:
    """gamma .5, lam .5, values 1 2 4, reward 8 at the end: deltas 0, 0, 4; advantages 1/4, 1, 4 (trace 1/4)."""
    advantage, returns = GAE(0.5, 0.5, whiten=False).of_tokens(
        f64([[0, 0, 8, 9]]), f64([[1, 2, 4, 9]]), mask_of([3], 4), LOCAL
    )
    assert advantage.tolist() == [[0.25, 1.0, 4.0, 0.0]]
    assert returns.tolist() == [[1.25, 3.0, 8.0, 0.0]]


def test_undiscounted_advantage_is_return_minus_value() -> None:
    """gamma = lam = 1: the whole reward, at every token."""
    values, mask = f64([[0.5, -1.0, 2.0], [0.25, 0.0, 0.0]]), mask_of([3, 1], 3)
    advantage, returns = GAE(whiten=False).of_tokens(f64([[0, 0, 1], [-1, 0, 0]]), values, mask, LOCAL)
    assert returns.tolist() == [[1.0, 1.0, 1.0], [-1.0, 0.0, 0.0]]
    assert_close(advantage, (returns - values) * mask)


rows = st.lists(st.lists(st.tuples(NUMBER, NUMBER), min_size=1, max_size=6), min_size=1, max_size=4)


def tensors(data: list[list[tuple[float, float]]], extra: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards, values and mask; padding holds numbers that must not be read."""
    width = max(map(len, data)) + extra
    padded = f64([[*row, *[(7.0, -9.0)] * (width - len(row))] for row in data])
    return padded[..., 0], padded[..., 1], mask_of([len(row) for row in data], width)


@LAWS
@given(rows, UNIT, UNIT)
def test_against_the_double_sum(data: list[list[tuple[float, float]]], gamma: float, lam: float) -> None:
    """Equation 16 as it stands: A_t = sum_l (gamma lam)^l delta_{t+l}."""
    rewards, values, mask = tensors(data)
    advantage, returns = GAE(gamma, lam, whiten=False).of_tokens(rewards, values, mask, LOCAL)
    for i, row in enumerate(data):
        r, v = np.array([x for x, _ in row]), np.array([*(y for _, y in row), 0.0])
        delta = r + gamma * v[1:] - v[:-1]
        want = [sum((gamma * lam) ** k * delta[t + k] for k in range(len(row) - t)) for t in range(len(row))]
        assert_close(advantage[i, : len(row)], torch.tensor(np.array(want)))
        assert_close(returns[i, : len(row)], torch.tensor(np.array(want) + v[:-1]))
    assert not bool(advantage[~mask].any() or returns[~mask].any())


@LAWS
@given(rows, st.integers(1, 4))
def test_padding_is_never_read(data: list[list[tuple[float, float]]], extra: int) -> None:
    """Whitening included."""
    narrow = GAE(0.9, 0.8).of_tokens(*tensors(data), LOCAL)
    wide = GAE(0.9, 0.8).of_tokens(*tensors(data, extra), LOCAL)
    for one, other in zip(narrow, wide, strict=True):
        assert_close(other[:, : one.shape[1]], one)
        assert not bool(other[:, one.shape[1] :].any())


def test_whitening_over_ranks_is_that_of_one_process() -> None:
    """Mean 0 and standard deviation 1 over all tokens, wherever they are; a rank may have none."""
    generator = torch.Generator().manual_seed(0)
    values, mask = torch.randn(5, 4, generator=generator, dtype=torch.float64), mask_of([4, 2, 3, 1, 4], 4)
    whole = whiten(values, mask, LOCAL)
    assert float(whole[mask].mean()) == pytest.approx(0, abs=1e-12)
    assert float(whole[mask].std()) == pytest.approx(1, abs=1e-6)
    cuts = [slice(0, 2), slice(2, 5), slice(5, 5)]
    parts = run_ranks(3, lambda reduce: whiten(values[cuts[reduce.rank]], mask[cuts[reduce.rank]], reduce))
    assert_close(torch.cat(parts), whole)


def test_batch_normalized_by_hand() -> None:
    """REINFORCE++: (R - 1/2) / std over the batch; the baseline variant takes each group's mean off first."""
    rewards, group = f64([1, 0, 1, 0]), torch.tensor([0, 0, 1, 1])
    std = (1 / 3) ** 0.5
    assert_close(BatchNormalized(eps=0.0)(rewards, group), f64([0.5, -0.5, 0.5, -0.5]) / std)
    uneven, group = f64([1, 1, 1, 0]), torch.tensor([0, 0, 1, 1])
    std = (0.5 / 3) ** 0.5
    assert_close(BatchNormalized("group", eps=0.0)(uneven, group), f64([0, 0, 0.5, -0.5]) / std)


def test_batch_normalized_over_ranks() -> None:
    """Ranks with whole groups; one without rows."""
    rewards, group = f64([1, 0, 3, 0, 2, 2]), torch.tensor([0, 0, 1, 1, 2, 2])
    for rule in (BatchNormalized(), BatchNormalized("group")):
        whole, cuts = rule(rewards, group), [slice(0, 2), slice(2, 6), slice(6, 6)]
        parts = run_ranks(3, lambda r, rule=rule, cuts=cuts: rule(rewards[cuts[r.rank]], group[cuts[r.rank]], r))
        assert_close(torch.cat(parts), whole)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GAE(gamma=1.1), "must lie in"),
        (lambda: GAE(lam=-0.1), "must lie in"),
        (lambda: BatchNormalized("row"), "batch or group"),  # type: ignore[arg-type]
    ],
)
def test_wrong_settings_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
