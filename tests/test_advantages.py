"""Base advantages: hand-computed numbers, laws, NumPy and TRL."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor
from torch.testing import assert_close
from trl_source import trl_function

from lit_rlvr.advantages import Advantage, GroupCentred, GroupNormalized, LeaveOneOut, Raw, group_sum

RULES: list[Advantage] = [GroupNormalized(), GroupCentred(), LeaveOneOut(), Raw()]
LAWS = settings(max_examples=40, deadline=None, derandomize=True)

rewards_and_groups = st.lists(
    st.tuples(st.sampled_from([0.0, 1.0, -1.0, 0.3, 2.5]), st.integers(0, 3)), min_size=1, max_size=12
).map(
    # Every group twice, so that none has a single member.
    lambda rows: (
        torch.tensor([r for r, _ in rows] + [r + 0.5 * (i % 2) for i, (r, _) in enumerate(rows)]),
        torch.tensor([g for _, g in rows] * 2),
    )
)

# Two interleaved groups: 7 holds 1, 0, 0, 1 and 3 holds 2, 5.
REWARDS = torch.tensor([1.0, 2.0, 0.0, 0.0, 5.0, 1.0])
GROUP = torch.tensor([7, 3, 7, 7, 3, 7])
STD7, STD3 = math.sqrt(1 / 3), math.sqrt(4.5)
"""Unbiased: the squares of +-0.5 sum to 1 over 4 - 1, those of +-1.5 to 4.5 over 2 - 1."""
SIDES = [(1, False), (-1, True), (-1, False), (-1, False), (1, True), (1, False)]
"""Above or below the group's mean, and whether the group is 3."""


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (GroupCentred(), [0.5, -1.5, -0.5, -0.5, 1.5, 0.5]),
        # Others' means: 1/3 for a 1, 2/3 for a 0; 5 for the 2 and 2 for the 5.
        (LeaveOneOut(), [2 / 3, -3.0, -2 / 3, -2 / 3, 3.0, 2 / 3]),
        (
            GroupNormalized(eps=0.25),
            [sign * (1.5 / (STD3 + 0.25) if wide else 0.5 / (STD7 + 0.25)) for sign, wide in SIDES],
        ),
        (Raw(), [1.0, 2.0, 0.0, 0.0, 5.0, 1.0]),
    ],
)
def test_hand_computed(rule: Advantage, expected: list[float]) -> None:
    """Numbers worked out on paper, in the rewards' dtype."""
    for dtype in (torch.float32, torch.float64):
        assert_close(rule(REWARDS.to(dtype), GROUP), torch.tensor(expected, dtype=dtype))


def test_default_eps_is_that_of_the_paper() -> None:
    """1e-6, visible where the spread is of its size."""
    rewards = torch.tensor([0.0, 2e-6], dtype=torch.float64)
    std = math.sqrt(2) * 1e-6
    want = torch.tensor([-1e-6, 1e-6], dtype=torch.float64) / (std + 1e-6)
    assert_close(GroupNormalized()(rewards, torch.zeros(2)), want)


def test_group_sum_counts_and_adds_per_row() -> None:
    """Each row sees its whole group's sum and size, in float64."""
    total, size = group_sum(REWARDS, GROUP)
    assert total.dtype == size.dtype == torch.float64
    assert total.tolist() == [2.0, 7.0, 2.0, 2.0, 7.0, 2.0]
    assert size.tolist() == [4.0, 2.0, 4.0, 4.0, 2.0, 4.0]


def test_group_sum_adds_in_float64() -> None:
    """Adding 1 to 2^24 is lost in float32."""
    total, _ = group_sum(torch.tensor([2.0**24, 1.0, 1.0]), torch.zeros(3))
    assert total.tolist() == [2.0**24 + 2] * 3


@pytest.mark.parametrize("rule", RULES)
def test_no_rows(rule: Advantage) -> None:
    """A rank without rows gets an empty result."""
    assert rule(torch.zeros(0), torch.zeros(0, dtype=torch.int64)).shape == (0,)


def transcription(rule: Advantage, r: NDArray[np.float64]) -> Any:
    """The formulas for one group."""
    if isinstance(rule, GroupNormalized):
        return (r - r.mean()) / (r.std(ddof=1) + 1e-6)
    if isinstance(rule, GroupCentred):
        return r - r.mean()
    if isinstance(rule, LeaveOneOut):
        return r - np.array([np.concatenate([r[:i], r[i + 1 :]]).mean() for i in range(len(r))])
    return r


@pytest.mark.parametrize("rule", RULES)
@given(rewards_and_groups)
@LAWS
def test_numpy_transcription(rule: Advantage, data: tuple[Tensor, Tensor]) -> None:
    """Equal to NumPy, group by group."""
    rewards, group = data[0].double().numpy(), data[1].numpy()
    want = np.empty_like(rewards)
    for name in np.unique(group):
        want[group == name] = transcription(rule, rewards[group == name])
    # NumPy's mean of equal rewards can be off by 1e-16, which a zero spread divides by eps = 1e-6: below atol 1e-7.
    assert_close(rule(data[0].double(), data[1]), torch.from_numpy(want))


@pytest.mark.parametrize("rule", [GroupNormalized(), GroupCentred(), LeaveOneOut()])
@given(rewards_and_groups)
@LAWS
def test_group_advantages_sum_to_zero(rule: Advantage, data: tuple[Tensor, Tensor]) -> None:
    """What one response gains over its group, the others lose."""
    total, _ = group_sum(rule(data[0].double(), data[1]), data[1])
    assert_close(total, torch.zeros_like(total))


@pytest.mark.parametrize("rule", RULES)
@given(rewards_and_groups, st.randoms(use_true_random=False), st.integers(1, 1000))
@LAWS
def test_rows_may_stand_anywhere(rule: Advantage, data: tuple[Tensor, Tensor], random: Any, shift: int) -> None:
    """Permuting rows permutes advantages, and the names of groups do not matter."""
    rewards, group = data
    order = torch.tensor(random.sample(range(len(rewards)), len(rewards)))
    assert_close(rule(rewards[order], shift - 3 * group[order]), rule(rewards, group)[order])


@given(rewards_and_groups, st.integers(-3, 3), st.sampled_from([0.5, 2.0, 8.0]))
@LAWS
def test_affine_rewards(data: tuple[Tensor, Tensor], shift: int, scale: float) -> None:
    """A shift changes no group advantage; a factor passes through, or disappears where eps does."""
    rewards, group = data[0].double(), data[1]
    mapped = shift + scale * rewards
    for rule in (GroupCentred(), LeaveOneOut()):
        assert_close(rule(mapped, group), scale * rule(rewards, group))
    assert_close(GroupNormalized(eps=scale * 0.1)(mapped, group), GroupNormalized(eps=0.1)(rewards, group))


@given(rewards_and_groups)
@LAWS
def test_leave_one_out_is_n_over_n_minus_1_times_centred(data: tuple[Tensor, Tensor]) -> None:
    """The known identity between RLOO and the centred reward."""
    rewards, group = data[0].double(), data[1]
    _, n = group_sum(rewards, group)
    assert_close(LeaveOneOut()(rewards, group), n / (n - 1) * GroupCentred()(rewards, group))


@pytest.mark.parametrize("rule", [GroupNormalized(), GroupCentred(), LeaveOneOut()])
@pytest.mark.parametrize("value", [0.0, 0.1, 1e6 + 1 / 3])
def test_equal_rewards_teach_nothing(rule: Advantage, value: float) -> None:
    """Exactly zero, also where the value has no exact binary form."""
    assert rule(torch.full((7,), value), torch.zeros(7)).tolist() == [0.0] * 7


@pytest.mark.parametrize("rule", RULES)
def test_smallest_group_is_enough_and_one_less_is_not(rule: Advantage) -> None:
    """Where a rule says 2, a lone response would get NaN or no signal at all."""
    n = rule.smallest_group
    assert rule(torch.arange(1.0, n + 1), torch.zeros(n)).abs().min() > 0
    if n > 1:
        lone = rule(torch.ones(n - 1), torch.zeros(n - 1))
        assert bool((lone.isnan() | (lone == 0)).all())


@given(st.lists(st.sampled_from([0.0, 1.0, 0.25, -2.0]), min_size=12, max_size=12))
@LAWS
def test_trl(values: list[float]) -> None:
    """TRL 1.16: nanstd (unbiased) of groups that stand together, and 1e-4 where the paper and we have 1e-6."""
    nanstd = trl_function("trainer/utils.py", "nanstd")
    rewards = torch.tensor(values)
    grouped = rewards.view(3, 4)
    centred = rewards - torch.nanmean(grouped, dim=1).repeat_interleave(4)
    group = torch.arange(3).repeat_interleave(4)
    want = centred / (nanstd(grouped, dim=1).repeat_interleave(4) + 1e-4)
    assert_close(GroupNormalized(eps=1e-4)(rewards, group), want)
    assert_close(GroupCentred()(rewards, group), centred)
