"""The least that a step could cost, by hand, and what enters the layers against every choice that there is."""

from __future__ import annotations

import math
from dataclasses import astuple, replace
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rollouts import build_rollout
from torch import Tensor

from benchmarks.ceilings import BACK_TO_BACK, PACKED, Ceilings, fastest, shapes
from benchmarks.entering import chosen, every_token, least, none_of, sampled
from benchmarks.floors import COUNTED, floors, needed_to_train, read_to_decode
from benchmarks.gate import Clock
from benchmarks.models import SIZES, Size
from benchmarks.settings import Settings
from benchmarks.step import over
from lit_rlvr.layout import Reader
from lit_rlvr.microbatch import cut
from lit_rlvr.reduce import LocalReduce

HAND = Size(10, 4, 2, 6, 2, 1, 3, prompts=2, responses=3, prompt_tokens=5, new_tokens=7)
FEW = replace(HAND, responses=2, new_tokens=3)


def flat(rate: float) -> Ceilings:
    """A machine on which every product is as fast."""
    return Ceilings(dict.fromkeys(shapes(HAND), rate), bandwidth=1e3, nominal=0.0)


def laid_out(size: Size, learns: Tensor) -> tuple[float, ...]:
    """Tokens and places that are read as micro-batches have them for the tokens ``learns`` [rows, T]; pairs by hand."""
    group = [row // size.responses for row in range(size.rows)]
    rollout = build_rollout([[0.0] * size.new_tokens] * size.rows, group=group)
    prompts = torch.tensor(group)[:, None] * 10 + torch.arange(size.prompt_tokens)
    rollout = replace(rollout, prompt_ids=prompts, prompt_mask=torch.ones_like(prompts, dtype=torch.bool))
    [(micro, _)] = cut(rollout, learns, 10**6, None, Reader(torch.device("cpu"), "shared"), LocalReduce())
    prompt = [(0.5 + j) for j in range(size.prompt_tokens)]
    pairs = len({group[row] for row, _ in learns.nonzero().tolist()}) * sum(prompt)
    for row in learns:
        last = max(row.nonzero().flatten().tolist(), default=0)
        pairs += sum(size.prompt_tokens + i + 0.5 for i in range(last))
    places = {(group[r], -1) if c == 0 else (r, c - 1) for r, c in learns.nonzero().tolist()}
    read_pairs = sum(size.prompt_tokens + i + 0.5 for _, i in places)
    return micro.ids.numel(), pairs, len(micro.index.unique()), read_pairs


@pytest.mark.parametrize("drawn", [1, 2, 3, 11, 12])
def test_what_enters_is_the_mean_over_every_choice(drawn: int) -> None:
    """Of the tokens that learn; what each choice needs is counted in what the training loop lays out for it."""
    counts = []
    for places in combinations(range(12), drawn):
        learns = torch.zeros(12, dtype=torch.bool)
        learns[list(places)] = True
        counts.append(laid_out(FEW, learns.view(4, 3)))
    mean = tuple(sum(column) / len(counts) for column in zip(*counts, strict=True))
    assert chosen(FEW, drawn / 12) == drawn
    assert astuple(least(FEW, drawn / 12)) == pytest.approx(mean)


def test_what_enters_is_what_simulated_draws_need() -> None:
    """On S: 100 draws, whose mean errs by less than a tenth of their deviation; five times that is allowed."""
    size, generator = SIZES["S"], torch.Generator().manual_seed(0)
    total = size.rows * size.new_tokens
    draws = []
    for _ in range(100):
        learns = torch.zeros(total, dtype=torch.bool)
        learns[torch.randperm(total, generator=generator)[: chosen(size, 0.05)]] = True
        columns = learns.view(size.rows, size.new_tokens) * torch.arange(size.new_tokens)
        draws.append(size.prompts * size.prompt_tokens + float(columns.amax(-1).sum()))
    found = torch.tensor(draws)
    assert abs(float(found.mean()) - least(size, 0.05).tokens) < 0.5 * float(found.std())


def test_the_chance_to_draw_none() -> None:
    for marked, total, drawn in ((1, 10, 3), (5, 40, 20), (64, 4096, 820), (640, 65_536, 13_108), (3, 5, 3)):
        exact = math.comb(total - marked, drawn) / math.comb(total, drawn)
        assert none_of(marked, total, drawn) == pytest.approx(exact, rel=1e-6, abs=1e-12)


@given(st.floats(0.01, 1.0), st.floats(0.01, 1.0))
def test_the_least_is_least(one: float, other: float) -> None:
    """It grows with the tokens that learn, and never beyond the work on all of them."""
    low, high = sorted((one, other))
    everything = every_token(HAND)
    for less, more, most in zip(
        astuple(least(HAND, low)), astuple(least(HAND, high)), astuple(everything), strict=True
    ):
        assert less <= more + 1e-9
        assert more <= most + 1e-9
    assert needed_to_train(HAND, low) <= needed_to_train(HAND, high) + 1e-9


def test_tokens_and_pairs_by_hand() -> None:
    """6 responses of 7 tokens to 2 prompts of 5; a token attends to those before it, itself by half."""
    response = 6 * 5 + 6 * 6 / 2
    assert astuple(every_token(HAND)) == (6 * 11, 6 * 11**2 / 2, 6 * 11, 6 * 11**2 / 2)
    assert astuple(sampled(HAND)) == (2 * 5 + 6 * 6, 2 * 12.5 + 6 * response, 2 + 36, 2 * 4.5 + 6 * response)
    assert astuple(least(HAND, 1.0)) == pytest.approx(astuple(sampled(HAND)))


def test_operations_of_a_step_by_hand() -> None:
    """A layer has 24 weights for keys and values and 120 behind them."""
    assert (HAND.body, HAND.late) == (2 * 144, 120)
    attention = 2 * 3 * ((2 * 12.5 + 6 * 48) + (2 * 4.5 + 6 * 48))
    rollouts = {
        ("rollout", "prompts"): 2 * (168 * 10 + 120 * 2),
        ("rollout", "body"): 2 * 288 * 36,
        ("rollout", "attention"): 4 * attention,
        ("rollout", "head"): 2 * 40 * 42,
    }
    wanted = rollouts | {
        ("train", "body"): 6 * 168 * 46,
        ("train", "last layer"): 6 * 120 * 38,
        ("train", "attention"): 12 * attention,
        ("train", "head"): 6 * 40 * 42,
        ("train", "AdamW"): 0.0,
    }
    found = {(f.part, f.name): f for f in floors(Settings("", HAND, rho=1.0), flat(2.0), "least")}
    assert {key: f.operations for key, f in found.items()} == pytest.approx(wanted)
    assert found["train", "head"].seconds == found["train", "head"].reachable == 6 * 40 * 42 / 2
    assert found["train", "AdamW"].seconds == 7 * 4 * (HAND.body + 40) / 1e3
    wanted |= {
        ("train", "body"): 6 * 168 * 66,
        ("train", "last layer"): 6 * 120 * 66,
        ("train", "attention"): 12 * 2 * 3 * 2 * 363,
        ("train", "head"): 6 * 40 * 9,  # 8.4 of 42 tokens
    }
    all_of_them = floors(Settings("", HAND, rho=0.2), flat(2.0), "all tokens")
    assert {(f.part, f.name): f.operations for f in all_of_them} == pytest.approx(wanted)


def test_decoding_on_a_gpu_waits_for_memory() -> None:
    """6 steps read all weights, 2 layers' keys and values of 3 numbers for 2 prompts of 5, and for 6 rows so far."""
    tokens = 6 * 2 * 5 + 6 * (1 + 2 + 3 + 4 + 5 + 6)
    assert read_to_decode(HAND) == 6 * (288 + 40) + 2 * 2 * 3 * tokens
    slow = {f.name: f for f in floors(Settings("", HAND, "cuda"), flat(1e9), "least") if f.part == "rollout"}
    multiplied = sum(slow[name].seconds for name in ("body", "attention", "head"))
    found = slow["memory, beyond products"]
    assert found.seconds == pytest.approx(2 * read_to_decode(HAND) / 1e3 - multiplied)
    assert found.operations == 0
    for counted in COUNTED:
        busy = floors(Settings("", HAND, "cuda"), flat(1e-9), counted)
        assert [f.seconds for f in busy if f.name == "memory, beyond products"] == [0.0]
    assert not [f for f in floors(Settings("", HAND), flat(1e9), "least") if "memory" in f.name]


def test_products_of_their_own_shape() -> None:
    """Forward and backward pass are three products, one of which is a weight gradient; the faster way counts."""
    products = {**flat(8.0).products, "head, weight gradient": 2.0, "head": 1.0, "head" + PACKED: 4.0}
    slow = replace(flat(8.0), products=products)
    head = next(f for f in floors(Settings("", HAND), slow, "least") if (f.part, f.name) == ("train", "head"))
    assert head.seconds == head.operations / 8
    assert head.reachable == pytest.approx(head.operations * (2 / 4 + 1 / 2) / 3)
    assert slow.rate("body") == 8.0


def test_distance_to_the_floor() -> None:
    for counted in COUNTED:
        each = floors(Settings("", HAND), flat(2.0), counted)
        least_seconds = sum(f.seconds for f in each)
        values = over(3 * least_seconds, each, flat(2.0))
        assert (values["times"], values["times_at_own_shapes"]) == (pytest.approx(3), pytest.approx(3))
        assert "mfu" not in values
        known = over(3.0, each, replace(flat(2.0), nominal=100.0))
        assert known["mfu"] == pytest.approx(sum(f.operations for f in each) / 300)


def test_small_products_run_back_to_back() -> None:
    """Between two looks at the clock there is more than one; a large one is measured alone."""
    done = [0]

    class Slow(Clock):
        """Takes 1 ms to be asked, in a world in which a piece of work takes ``each`` seconds."""

        each = 1e-4

        def now(self) -> float:
            return done[0] * self.each

        def since(self, start: float) -> float:
            return self.now() - start + 1e-3

    def work() -> None:
        done[0] += 1

    clock = Slow("cpu")
    assert 1e-4 < fastest(clock, work) < 4e-4
    clock.each = 2 * BACK_TO_BACK
    assert fastest(clock, work) == pytest.approx(2 * BACK_TO_BACK + 1e-3)


def test_a_coarse_clock_does_not_make_a_product_free() -> None:
    """It goes on by 1 ms at a time, so that what it tells of 5 ms or more is a fifth too short at worst."""
    done = [0]

    class Coarse(Clock):
        def now(self) -> float:
            return done[0] // 10 * 0.001

        def since(self, start: float) -> float:
            return self.now() - start

    def work() -> None:
        done[0] += 1

    assert 0.8e-4 <= fastest(Coarse("cpu"), work) <= 1.01e-4


def test_a_gpu_gets_larger_products() -> None:
    for product in ("square", "body", "head"):
        assert shapes(HAND, "cuda")[product][0] > shapes(HAND, "cpu")[product][0]
