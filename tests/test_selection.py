"""Choosing exactly k over all ranks, against ``torch.topk`` and Python's sort."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rollouts import ThreadedReduce, run_ranks
from torch import Tensor

from lit_rlvr.reduce import LocalReduce, Reduce
from lit_rlvr.selection import from_sortable, kth_largest, quantile, share, sortable, top_k

few = settings(max_examples=50, deadline=None, derandomize=True)
LARGEST = 2**63 - 1
KEYS = st.one_of(st.integers(0, 3), st.sampled_from([2**16 - 1, 2**16, 2**47, 2**48, LARGEST - 1, LARGEST]))
"""Many ties, and numbers on both sides of where a digit ends."""


def sort_reference(first: list[int], second: list[int], eligible: list[bool], k: int) -> list[bool]:
    """The first k eligible places by both keys, larger first."""
    places = sorted((i for i, e in enumerate(eligible) if e), key=lambda i: (first[i], second[i]), reverse=True)
    return [i in set(places[:k]) for i in range(len(first))]


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[int], list[int], list[bool], int]:
    """A key with ties, a unique one, who may be chosen, and how many."""
    first = draw(st.lists(KEYS, max_size=12))
    second = draw(st.permutations([7 * i for i in range(len(first))]))
    eligible = draw(st.lists(st.booleans(), min_size=len(first), max_size=len(first)))
    return first, second, eligible, draw(st.integers(0, sum(eligible)))


def choose(
    first: list[int], second: list[int], eligible: list[bool], k: int, reduce: Reduce | None = None
) -> list[bool]:
    """``top_k`` on lists."""
    keys = [torch.tensor(key, dtype=torch.int64) for key in (first, second)]
    chosen: list[bool] = top_k(keys, torch.tensor(eligible, dtype=torch.bool), k, reduce or LocalReduce()).tolist()
    return chosen


@few
@given(problems())
def test_against_a_sort(problem: tuple[list[int], list[int], list[bool], int]) -> None:
    """Exactly k, ties in the first key by the second, k from 0 to all."""
    chosen = choose(*problem)
    assert chosen == sort_reference(*problem)
    assert sum(chosen) == problem[3]


@few
@given(problems(), st.integers(2, 3), st.randoms(use_true_random=False))
def test_several_ranks_choose_as_one(
    problem: tuple[list[int], list[int], list[bool], int], ranks: int, rng: Any
) -> None:
    """Elements dealt out at random; a rank may have none."""
    first, second, eligible, k = problem
    home = [rng.randrange(ranks) for _ in first]

    def rank(reduce: ThreadedReduce) -> dict[int, bool]:
        mine = [i for i, h in enumerate(home) if h == reduce.rank]
        chosen = choose([first[i] for i in mine], [second[i] for i in mine], [eligible[i] for i in mine], k, reduce)
        return dict(zip(mine, chosen, strict=True))

    together = {i: chosen for part in run_ranks(ranks, rank) for i, chosen in part.items()}
    assert [together[i] for i in range(len(first))] == sort_reference(first, second, eligible, k)


@few
@given(st.lists(st.floats(-10, 10, width=32), unique=True, min_size=1, max_size=20), st.data())
def test_against_torch_topk(numbers: list[float], data: st.DataObject) -> None:
    """Floats of both signs through ``sortable``; no ties, so ``torch.topk`` is well defined."""
    values = torch.tensor([x + 0.0 for x in numbers]).unique()
    values = values[torch.randperm(len(values), generator=torch.Generator().manual_seed(len(values)))]
    k = data.draw(st.integers(0, len(values)))
    chosen = top_k([sortable(values)], torch.ones_like(values, dtype=torch.bool), k, LocalReduce())
    assert chosen.nonzero().squeeze(-1).tolist() == sorted(values.topk(k).indices.tolist())


def test_two_dimensions_and_the_whole_range() -> None:
    """[B, T] goes in and out; k = 0 and k = n need no special case."""
    keys = [torch.tensor([[3, 1], [2, 3]]), torch.tensor([[0, 1], [2, 3]])]
    everything = torch.ones(2, 2, dtype=torch.bool)
    counts: dict[int, list[list[int]]] = {
        0: [[0, 0], [0, 0]], 1: [[0, 0], [0, 1]], 2: [[1, 0], [0, 1]], 3: [[1, 0], [1, 1]], 4: [[1, 1], [1, 1]],
    }  # fmt: skip
    for k, wanted in counts.items():
        assert top_k(keys, everything, k, LocalReduce()).int().tolist() == wanted


def test_the_candidates_are_not_edited() -> None:
    """The caller's mask and keys stay."""
    key, eligible = torch.tensor([1, 1, 2]), torch.tensor([True, True, False])
    top_k([key, torch.tensor([5, 6, 7])], eligible, 1, LocalReduce())
    assert eligible.tolist() == [True, True, False]
    assert key.tolist() == [1, 1, 2]


def test_no_rank_has_anything() -> None:
    """k = 0 of nothing, on two ranks."""

    def rank(reduce: ThreadedReduce) -> Tensor:
        nothing = torch.zeros(0, 4, dtype=torch.int64)
        return top_k([nothing], nothing.bool(), 0, reduce)

    assert [part.shape for part in run_ranks(2, rank)] == [(0, 4), (0, 4)]


FLOATS = st.floats(width=32, allow_nan=False)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(FLOATS, FLOATS)
def test_sortable_keeps_the_order(a: float, b: float) -> None:
    """Infinities, subnormals and both zeros included."""
    low, high = sortable(torch.tensor([a, b])).tolist()
    assert (low < high) == (a < b)
    assert (low == high) == (a == b)
    assert 0 <= low < 2**32


def test_sortable_by_hand() -> None:
    """In ascending order; the zeros are one."""
    values = torch.tensor([-math.inf, -2.5, -1e-45, -0.0, 0.0, 1e-45, 2.5, math.inf])
    assert sortable(values).diff().sign().tolist() == [1, 1, 1, 0, 1, 1, 1]
    assert sortable(torch.tensor([0.0])).tolist() == [2**31]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(1, 1000), st.integers(0, 10**6))
def test_share_is_the_exact_ceiling(permille: int, n: int) -> None:
    """Of the decimal number that was written, not of its nearest binary one."""
    assert share(permille / 1000, n) == math.ceil(Fraction(permille, 1000) * n)


@pytest.mark.parametrize(("rho", "n", "k"), [(0.07, 100, 7), (0.14, 50, 7), (0.14, 51, 8), (0.2, 15, 3), (1.0, 9, 9)])
def test_share_where_floating_point_rounds_up(rho: float, n: int, k: int) -> None:
    """0.07 * 100 = 7.000000000000001 and 0.14 * 50 likewise."""
    assert math.ceil(0.07 * 100) == 8
    assert share(rho, n) == k
    assert share(rho, 0) == 0


def test_ranks_that_do_not_make_the_same_calls_fail() -> None:
    """The tests' own ranks would notice a collective that only one of them makes."""

    def different(reduce: ThreadedReduce) -> None:
        (reduce.sum if reduce.rank else reduce.max)(torch.ones(1))

    def one_more(reduce: ThreadedReduce) -> None:
        for _ in range(1 + reduce.rank):
            reduce.sum(torch.ones(1))

    with pytest.raises(AssertionError, match="the ranks do not make the same calls"):
        run_ranks(2, different)
    with pytest.raises(Exception, match=r"^$") as caught:
        run_ranks(2, one_more, timeout=0.2)
    assert type(caught.value).__name__ == "BrokenBarrierError"
    assert [int(total) for total in run_ranks(3, lambda reduce: reduce.sum(torch.tensor(reduce.rank)))] == [3, 3, 3]


@st.composite
def spread_values(draw: st.DrawFn) -> tuple[Tensor, Tensor, list[int], int]:
    """Values with ties, at least one that counts, and a rank for each of them."""
    values = draw(st.lists(st.one_of(st.sampled_from([0.0, 0.5, -0.0]), st.floats(-9, 9, width=32)), min_size=1))
    counts = draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values)))
    counts[draw(st.integers(0, len(values) - 1))] = True
    ranks = draw(st.integers(1, 3))
    home = draw(st.lists(st.integers(0, ranks - 1), min_size=len(values), max_size=len(values)))
    return torch.tensor(values), torch.tensor(counts), home, ranks


@few
@given(spread_values(), st.floats(0, 1))
def test_order_statistics_over_ranks(problem: tuple[Tensor, Tensor, list[int], int], q: float) -> None:
    """Each k-th largest against a sort, the quantile against torch's of all values in one place: the same float32."""
    values, counts, home, ranks = problem
    place, ordered = torch.tensor(home), values[counts].sort(descending=True).values

    def rank(reduce: ThreadedReduce) -> list[float]:
        own, of_them = values[place == reduce.rank], counts[place == reduce.rank]
        found = [kth_largest(own, of_them, k, reduce) for k in {1, len(ordered) // 2 + 1, len(ordered)}]
        return [*found, quantile(own, of_them, q, reduce)]

    wanted = [float(ordered[k - 1]) for k in {1, len(ordered) // 2 + 1, len(ordered)}]
    assert run_ranks(ranks, rank) == [[*wanted, float(torch.quantile(values[counts], q))]] * ranks


def test_order_statistics_of_too_few() -> None:
    """There is no such value; the quantile of nothing is no number."""
    one, nothing = torch.tensor([1.0]), torch.zeros(0)
    for k in (0, 2):
        with pytest.raises(ValueError, match=f"there is no {k}-th largest of 1 values"):
            kth_largest(one, torch.tensor([True]), k, LocalReduce())
    assert math.isnan(quantile(nothing, nothing.bool(), 0.5, LocalReduce()))


@few
@given(st.floats(width=32, allow_nan=False))
def test_sortable_and_back(value: float) -> None:
    """Every float32 is found again; -0.0 comes back as 0.0."""
    assert from_sortable(int(sortable(torch.tensor([value])))) == value


class Crowd(LocalReduce):
    """As if each of ``size`` ranks held what this one holds."""

    def __init__(self, size: int) -> None:
        self.size = size

    def sum(self, value: Tensor) -> Tensor:
        return value * self.size


class Low(LocalReduce):
    """As if another rank held ``size`` tokens more, all of which come last."""

    def __init__(self, size: int) -> None:
        self.size = size

    def sum(self, value: Tensor) -> Tensor:
        return value + torch.nn.functional.pad(torch.tensor([self.size]), (0, value.numel() - 1)).view_as(value)


def test_quantiles_of_more_tokens_than_float32_can_count() -> None:
    """2^30 tokens: each of 0 ... 7 2^27 times. Where the place falls between two values it is interpolated.

    At q = .125 the place is .125 (2^30 - 1), an eighth short of where the ones begin; in float32 it would be there.
    """
    values, everyone = torch.arange(8.0), torch.ones(8, dtype=torch.bool)
    crowd, each = Crowd(1 << 27), 1 << 27
    wanted = {0.0: 0.0, 0.125: 0.875, 0.3: 2.0, 0.5: 3.5, 0.8: 6.0, 1.0: 7.0}
    assert {q: quantile(values, everyone, q, crowd) for q in wanted} == wanted
    assert [kth_largest(values, everyone, k, crowd) for k in (each, each + 1, 8 * each)] == [7.0, 6.0, 0.0]


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_choosing_among_more_tokens_than_float32_can_count(k: int) -> None:
    """Another rank's 2^25 + 1 tokens come after all of ours."""
    keys = [torch.tensor([5, 9, 7, 9]) << 20, torch.tensor([1, 2, 3, 4])]
    everyone = torch.ones(4, dtype=torch.bool)
    chosen = top_k(keys, everyone, k, Low((1 << 25) + 1))
    assert chosen.nonzero().flatten().tolist() == sorted([3, 1, 2, 0][:k])
