"""EntropyTopK: which tokens it keeps, what it divides by, what it logs, and how TRL's mask differs."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from lit_rlvr_callbacks import EntropyTopK
from rollouts import build_rollout, full_credit, phases, random_credit, random_rollout, run_chain
from torch import Tensor
from trl_source import trl_entropy_mask

from lit_rlvr.credit import CreditContext
from lit_rlvr.engines import InProcessEngine
from lit_rlvr.schedule import Schedule
from lit_rlvr.types import Credit, RolloutBatch

ENTROPIES = [[0.1, 0.9, 0.5], [0.7, 0.2]]
few = settings(max_examples=40, deadline=None, derandomize=True)


def kept(callback: EntropyTopK, rollout: RolloutBatch, credit: Credit | None = None, seed: int = 0) -> Tensor:
    """The tokens that still have a weight [B, T]."""
    return run_chain([callback], rollout, credit or full_credit(rollout), CreditContext(seed=seed)).weight > 0


def metrics(callback: EntropyTopK, rollout: RolloutBatch, credit: Credit | None = None) -> dict[str, float]:
    """What it logs, without the prefix."""
    ctx = CreditContext()
    run_chain([callback], rollout, credit or full_credit(rollout), ctx)
    return {name.removeprefix("credit/EntropyTopK/"): value for name, value in ctx.metrics.items()}


def sort_reference(rollout: RolloutBatch, eligible: Tensor, k: int, sign: int) -> Tensor:
    """The first ``k`` eligible tokens by (-sign * entropy, position, draw, sample), with Python's sort."""
    places = [(b, t) for b, t in eligible.nonzero().tolist()]
    places.sort(key=lambda p: (-sign * float(rollout.entropies[p]), p[1], *rollout.uid[p[0], 1:].tolist()))
    mask = torch.zeros_like(eligible)
    for place in places[:k]:
        mask[place] = True
    return mask


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"rho": 0.4}, [[0, 1, 0], [1, 0, 0]]),  # ceil(0.4 * 5) = 2: .9 and .7
        ({"rho": 0.41}, [[0, 1, 1], [1, 0, 0]]),  # ceil(2.05) = 3
        ({"rho": 1e-6}, [[0, 1, 0], [0, 0, 0]]),  # never none of some
        ({"rho": 0.4, "select": "bottom"}, [[1, 0, 0], [0, 1, 0]]),  # .1 and .2
        ({"rho": 0.8, "select": "bottom"}, [[1, 0, 1], [1, 1, 0]]),
        ({"rho": 1.0}, [[1, 1, 1], [1, 1, 0]]),
    ],
)
def test_by_hand(options: dict[str, Any], wanted: list[list[int]]) -> None:
    """Five tokens; kept ones keep weight and count, dropped ones lose both, advantages stay."""
    rollout = build_rollout(ENTROPIES)
    credit = full_credit(rollout, [2.0, -3.0])
    after = run_chain([EntropyTopK(**options)], rollout, credit, CreditContext())
    assert after.weight.tolist() == wanted
    assert after.count.tolist() == wanted
    assert torch.equal(after.advantage, credit.advantage)


def test_normalising_by_all_keeps_the_count() -> None:
    """v1 of the paper: the loss is smaller by the share of kept tokens."""
    rollout = build_rollout(ENTROPIES)
    after = run_chain([EntropyTopK(0.4, normalize="all")], rollout, full_credit(rollout), CreditContext())
    assert after.weight.tolist() == [[0, 1, 0], [1, 0, 0]]
    assert after.count.tolist() == [[1, 1, 1], [1, 1, 0]]


def test_kept_tokens_keep_the_weight_that_they_had() -> None:
    """An importance weight survives the selection."""
    rollout = build_rollout(ENTROPIES)
    credit = replace(full_credit(rollout), weight=torch.tensor([[0.5, 0.25, 2.0], [3.0, 1.0, 0.0]]))
    after = run_chain([EntropyTopK(0.4)], rollout, credit, CreditContext())
    assert after.weight.tolist() == [[0, 0.25, 0], [3.0, 0, 0]]


@few
@given(phases(), st.integers(1, 1000), st.sampled_from(["top", "bottom", "random"]))
def test_exactly_the_share_is_kept(phase: tuple[RolloutBatch, Credit], permille: int, select: Any) -> None:
    """ceil(rho n) of the n tokens that still learn, whatever is tied; none that had no weight."""
    rollout, credit = phase
    eligible = credit.weight > 0
    mask = kept(EntropyTopK(permille / 1000, select), rollout, credit)
    assert int(mask.sum()) == -(-permille * int(eligible.sum()) // 1000)
    assert not bool((mask & ~eligible).any())


@few
@given(phases(), st.sampled_from([0.1, 0.2, 0.5, 0.8]), st.sampled_from(["top", "bottom"]))
def test_the_kept_are_those_that_a_sort_puts_first(phase: tuple[RolloutBatch, Credit], rho: float, select: Any) -> None:
    """Ties included; tokens without weight are neither counted nor kept."""
    rollout, credit = phase
    eligible = credit.weight > 0
    k = -(-int(eligible.sum()) * round(rho * 10) // 10)
    wanted = sort_reference(rollout, eligible, k, 1 if select == "top" else -1)
    assert torch.equal(kept(EntropyTopK(rho, select), rollout, credit), wanted)


def test_all_tied_goes_by_position_then_draw_then_sample() -> None:
    """Four rows of three tokens, ceil(.5 * 12) = 6: all four first tokens, then the earliest draw's second tokens."""
    rollout = build_rollout([[0.3] * 3] * 4, group=[8, 5, 8, 5])
    assert kept(EntropyTopK(0.5), rollout).int().tolist() == [[1, 0, 0], [1, 1, 0], [1, 0, 0], [1, 1, 0]]
    five = [[1, 0, 0], [1, 1, 0], [1, 0, 0], [1, 0, 0]]
    assert kept(EntropyTopK(5 / 12), rollout).int().tolist() == five
    assert kept(EntropyTopK(5 / 12, "bottom"), rollout).int().tolist() == five


def test_many_zeros_do_not_keep_everything() -> None:
    """With 95 % of 100 entropies at 0 the 80 % quantile is 0, and a ``>= quantile`` rule keeps all 100."""
    rollout = build_rollout([[0.0] * 24 + [0.1 + row] for row in range(4)])
    entropies = rollout.entropies.clone()
    entropies[0, 0] = 2.0
    rollout = replace(rollout, entropies=entropies)
    assert int(trl_entropy_mask(rollout.entropies, rollout.response_mask, 0.2).sum()) == 100
    mask = kept(EntropyTopK(0.2), rollout)
    assert int(mask.sum()) == 20
    assert bool(mask[rollout.entropies > 0].all())
    # The other 15 are zeros at the earliest positions: 3 rows at position 0, 4 each at positions 1 to 3.
    assert mask[:, :4].all()
    assert int(mask[:, 4:24].sum()) == 0


def test_random_is_a_hash_of_seed_phase_and_token() -> None:
    """Another seed or phase gives another set; entropies and row order do not matter."""
    sizes, choose = [4, 4], EntropyTopK(0.5, "random")
    rollout = random_rollout(sizes, 8, seed=0)
    mask = kept(choose, rollout)
    flat = replace(rollout, entropies=torch.zeros_like(rollout.entropies))
    assert torch.equal(kept(choose, flat), mask)
    order = torch.arange(len(rollout)).flip(0)
    assert torch.equal(kept(choose, rollout.rows(order)), mask[order])
    assert not torch.equal(kept(choose, rollout, seed=1), mask)
    assert not torch.equal(kept(choose, random_rollout(sizes, 8, seed=0, phase=1)), mask)


def test_random_keeps_every_token_equally_often() -> None:
    """3 of 10 tokens, 400 seeds: each is kept 120 times, give or take 5 standard deviations of 9.2."""
    rollout = build_rollout([[0.0, 0.0, 1.0, 1.0, 2.0], [3.0] * 5])
    times = torch.stack([kept(EntropyTopK(0.3, "random"), rollout, seed=seed) for seed in range(400)]).sum(0)
    assert int(times.sum()) == 1200
    assert bool(((times - 120).abs() < 46).all())


# Shares whose quantile places are exact in float32, so that interpolation does not push TRL's threshold past a token.
@few
@given(
    st.sampled_from([0.125, 0.25, 0.5, 0.75]), st.lists(st.integers(1, 6), min_size=1, max_size=6), st.integers(0, 99)
)
def test_against_trl(rho: float, lengths: list[int], seed: int) -> None:
    """Without ties TRL keeps the top floor(rho (n - 1)) + 1 of n tokens: the same as ceil(rho n), or one fewer.

    TRL compares with an interpolated quantile of each micro-batch, so it keeps more where entropies are tied, and its
    set depends on the micro-batch; here exactly ceil(rho n) of the phase's tokens are kept.
    """
    n = sum(lengths)
    values = (torch.randperm(n, generator=torch.Generator().manual_seed(seed)) / 8).tolist()
    rollout = build_rollout([[values.pop() for _ in range(length)] for length in lengths])
    ours, theirs = kept(EntropyTopK(rho), rollout), trl_entropy_mask(rollout.entropies, rollout.response_mask, rho)
    assert int(theirs.sum()) == math.floor(rho * (n - 1)) + 1
    assert not bool((theirs & ~ours).any())
    if int(theirs.sum()) == math.ceil(rho * n):
        assert torch.equal(theirs, ours)
    else:
        (extra,) = rollout.entropies[ours & ~theirs].tolist()
        rest = rollout.entropies[rollout.response_mask & ~theirs]
        assert (rho * n) % 1 < rho
        assert extra == float(rest.max())


def test_metrics_by_hand() -> None:
    """Kept .9 and .7; dropped .1, .5, .2; the third response keeps nothing."""
    rollout = build_rollout([[0.1, 0.9], [0.7, 0.5], [0.2]])
    common = {"kept_fraction": 2 / 5, "sequences_without_kept": 1 / 3, "kept_per_sequence": 2 / 3}
    assert metrics(EntropyTopK(0.4), rollout) == pytest.approx(
        {**common, "entropy_kept": 0.8, "entropy_dropped": 0.8 / 3, "threshold": 0.7}
    )
    # Bottom: .1 and .2 are kept, the threshold is the largest of them, and the second response keeps nothing.
    assert metrics(EntropyTopK(0.4, "bottom"), rollout) == pytest.approx(
        {**common, "entropy_kept": 0.15, "entropy_dropped": 2.1 / 3, "threshold": 0.2}
    )
    assert sorted(metrics(EntropyTopK(0.4, "random"), rollout)) == sorted(
        ["kept_fraction", "entropy_kept", "entropy_dropped", "kept_per_sequence", "sequences_without_kept"]
    )


def test_metrics_are_about_the_tokens_that_learnt_before() -> None:
    """A response without weight is not one that lost its tokens, and its entropies enter no mean."""
    rollout = build_rollout([[0.1, 0.9], [5.0, 6.0]])
    credit = full_credit(rollout)
    credit = replace(credit, weight=credit.weight * torch.tensor([[1.0], [0.0]]))
    assert metrics(EntropyTopK(0.5), rollout, credit) == pytest.approx(
        {
            "kept_fraction": 0.5, "entropy_kept": 0.9, "entropy_dropped": 0.1, "kept_per_sequence": 1.0,
            "sequences_without_kept": 0.0, "threshold": 0.9,
        }
    )  # fmt: skip


@pytest.mark.parametrize("select", ["top", "bottom", "random"])
def test_nothing_to_choose_from(select: Any) -> None:
    """No token with a weight, and no rows at all: everything stays, and the log holds finite numbers."""
    rollout = random_rollout([3], 4, seed=0)
    silent = replace(random_credit(rollout, 0), weight=torch.zeros_like(rollout.old_logprobs))
    nobody = torch.zeros(0, dtype=torch.int64)
    for facts, credit in ((rollout, silent), (rollout.rows(nobody), silent.rows(nobody))):
        ctx = CreditContext()
        after = run_chain([EntropyTopK(0.2, select)], facts, credit, ctx)
        assert torch.equal(after.count, credit.count)
        assert torch.equal(after.weight, credit.weight)
        assert set(ctx.metrics.values()) == {0.0}


@pytest.mark.parametrize("rho", [0.0, -0.1, 1.01, float("nan")])
def test_rho_out_of_range_is_refused(rho: float) -> None:
    """The message says the range."""
    with pytest.raises(ValueError, match=r"EntropyTopK\.rho must lie in \(0, 1\], got"):
        EntropyTopK(rho)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"select": "Top"}, "select must be one of top, bottom, band, random, got 'Top'"),
        ({"normalize": "none"}, "normalize must be one of selected, all, got 'none'"),
        ({"preset": "paper"}, "preset must be one of invariant, paper_v2, paper_v1, trl, got 'paper'"),
        ({"source": "current"}, r"source must be old or rollout at scope: phase"),
        ({"preset": "trl", "scope": "phase"}, r"source must be old or rollout at scope: phase"),
        ({"preset": "trl", "select": "random"}, "rule must be exact with select: random"),
        ({"select": "band"}, "band must be given with select: band"),
        ({"band": [0.4, 0.6]}, "band must be given with select: band, and with that alone"),
        ({"select": "band", "band": [0.6, 0.4]}, r"band must be \[low, high\] with 0 <= low < high <= 1, got"),
        ({"select": "band", "band": [0.6]}, r"band must be \[low, high\]"),
        ({"select": "band", "band": [0.4, 0.6], "rho": 0.2}, "rho must be left out with select: band"),
        ({"rho": Schedule(start=1.0, end=0.0, phases=3)}, r"rho must lie in \(0, 1\], got 0\.0"),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict[str, Any], message: str) -> None:
    """With a sentence that names the option; nothing is taken for something else."""
    with pytest.raises(ValueError, match=f"EntropyTopK.{message}"):
        EntropyTopK(**options)


@pytest.mark.parametrize(
    ("band", "wanted"),
    [
        # 5 tokens .1 .2 .5 .7 .9; the top 1 - low less the top 1 - high, in whole tokens: ceil(5 x).
        ([0.0, 0.4], [[1, 0, 0], [0, 1, 0]]),
        ([0.4, 0.8], [[0, 0, 1], [1, 0, 0]]),
        ([0.8, 1.0], [[0, 1, 0], [0, 0, 0]]),
        ([0.0, 1.0], [[1, 1, 1], [1, 1, 0]]),
    ],
)
def test_a_band_by_hand(band: list[float], wanted: list[list[int]]) -> None:
    """Bands that meet share no token, and those from 0 to 1 hold all."""
    rollout = build_rollout(ENTROPIES)
    assert kept(EntropyTopK(select="band", band=band), rollout).int().tolist() == wanted
    seen = metrics(EntropyTopK(select="band", band=band), rollout)
    inside = [
        value for row, marks in zip(ENTROPIES, wanted, strict=True) for value, k in zip(row, marks, strict=False) if k
    ]
    assert (seen["threshold"], seen["threshold_high"]) == pytest.approx((min(inside), max(inside)))


@few
@given(phases(), st.floats(0.01, 0.99), st.sampled_from(["exact", "quantile"]))
def test_bands_that_meet_part_the_tokens(phase: tuple[RolloutBatch, Credit], edge: float, rule: Any) -> None:
    """Every eligible token is in one of the two, and the upper one is the top 1 - edge."""
    rollout, credit = phase
    low, high = (
        kept(EntropyTopK(select="band", band=band, rule=rule), rollout, credit) for band in ([0.0, edge], [edge, 1.0])
    )
    assert torch.equal(low ^ high, credit.weight > 0)
    assert torch.equal(high, kept(EntropyTopK(1 - edge, rule=rule), rollout, credit))


@few
@given(phases(), st.floats(0.01, 1.0), st.sampled_from(["top", "bottom"]))
def test_the_quantile_rule_against_numpy(phase: tuple[RolloutBatch, Credit], rho: float, select: Any) -> None:
    """H >= the interpolated 1 - rho quantile of the eligible tokens; ``bottom`` is the same of -H."""
    rollout, credit = phase
    eligible = credit.weight > 0
    score = rollout.entropies if select == "top" else -rollout.entropies
    wanted = eligible
    if bool(eligible.any()):
        # In float32, as torch.quantile: float64 would differ by a token where 1 - rho hits a token's place exactly.
        wanted = eligible & (score >= torch.quantile(score[eligible], 1 - rho))
        numpy = np.quantile(score[eligible].double().numpy(), 1 - rho)
        clear = (score.double() - numpy).abs() > 1e-5
        assert torch.equal(wanted & clear, eligible & clear & (score.double() >= numpy))
    assert torch.equal(kept(EntropyTopK(rho, select, rule="quantile"), rollout, credit), wanted)


def test_rho_by_schedule() -> None:
    """1, .8, .6, .4 of five tokens; ``rho`` is logged then, and only then."""
    rollout, schedule = build_rollout(ENTROPIES), Schedule(start=1.0, end=0.4, phases=3)
    for step, count in enumerate((5, 4, 3, 2, 2)):
        ctx = CreditContext(step=step)
        after = run_chain([EntropyTopK(schedule)], rollout, full_credit(rollout), ctx)
        assert int((after.weight > 0).sum()) == count
        assert ctx.metrics["credit/EntropyTopK/rho"] == pytest.approx(count / 5)
    assert "rho" not in metrics(EntropyTopK(0.4), rollout)


def checked(callback: EntropyTopK, engine: Any, dtype: str = "float32", precision: str = "32-true") -> None:
    """Let ``callback`` look at a run's options."""
    trainer = SimpleNamespace(precision=precision, strategy=None)
    module: Any = SimpleNamespace(
        engine=engine, trainer=trainer, dtype_name=dtype, batch=SimpleNamespace(steps_per_phase=4)
    )
    callback.check(module)


def test_an_engine_that_cannot_tell_is_refused_for_rollout_entropies() -> None:
    """The engine's entropies are used only where it gives them exactly; ``old`` takes the scoring pass's instead."""
    checked(EntropyTopK(source="rollout"), InProcessEngine())
    for inexact in ({"dtype": "bfloat16"}, {"precision": "bf16-mixed"}):
        with pytest.raises(ValueError, match="EntropyTopK cannot use source: rollout, because InProcessEngine does"):
            checked(EntropyTopK(source="rollout"), InProcessEngine(), **inexact)
        checked(EntropyTopK(), InProcessEngine(), **inexact)


def test_a_scoring_pass_is_announced(caplog: pytest.LogCaptureFixture) -> None:
    """``current`` at mini-batch scope costs one; nothing else does."""
    caplog.set_level("INFO")
    checked(EntropyTopK(preset="paper_v2"), InProcessEngine())
    assert caplog.messages == []
    checked(EntropyTopK(preset="paper_v2", scope="mini_batch"), InProcessEngine())
    assert caplog.messages == ["EntropyTopK: a scoring pass before each optimiser step of a phase but the first"]


@few
@given(phases())
def test_a_larger_share_keeps_what_a_smaller_one_keeps(phase: tuple[RolloutBatch, Credit]) -> None:
    """Sets are nested, for every way of choosing."""
    rollout, credit = phase
    assume(bool((credit.weight > 0).any()))
    selects: list[Any] = ["top", "bottom", "random"]
    for select in selects:
        small, large = (kept(EntropyTopK(rho, select), rollout, credit) for rho in (0.3, 0.6))
        assert not bool((small & ~large).any())
