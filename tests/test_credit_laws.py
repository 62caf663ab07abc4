"""The laws of credit, checked for every callback of ``lit_rlvr_callbacks``: one table, one test per law."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import lit_rlvr_callbacks
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from lit_rlvr_callbacks import (
    ClipCov,
    DefectPenalty,
    EntropyAdvantage,
    EntropyBonus,
    EntropyTopK,
    KLCov,
    MaskTruncated,
    NegativeReinforcement,
    PerplexityShaping,
    PositionShaping,
    PositiveNegative,
    StageDetector,
    TruncatedImportance,
    ZeroVariance,
)
from rollouts import (
    ThreadedReduce,
    current_policy,
    narrow,
    phases,
    random_credit,
    random_rollout,
    rollouts,
    run_ranks,
    widen,
)
from torch import Tensor
from torch.testing import assert_close

from lit_rlvr.credit import CreditCallback, CreditContext, assign_credit, observe, penalties, shape_rewards
from lit_rlvr.reduce import LocalReduce, Reduce
from lit_rlvr.schedule import Schedule
from lit_rlvr.types import Credit, RolloutBatch, Tokens

ROOT = Path(__file__).parents[1]
Make = Callable[[], CreditCallback]


@dataclass(frozen=True)
class Entry:
    """A class of callbacks: its file in ``configs/callbacks``, instances that act and some that change nothing."""

    config: str
    active: dict[str, Make]
    neutral: dict[str, Make]


TABLE: dict[str, Entry] = {
    "ClipCov": Entry(
        "clip_cov",
        {
            "mini-batch": lambda: ClipCov(ratio=0.2, low=-2.0, high=5.0),
            "micro-batch": lambda: ClipCov(ratio=0.2, low=-2.0, high=5.0, scope="micro_batch"),
        },
        {"ratio 0": lambda: ClipCov(ratio=0.0), "nothing between": lambda: ClipCov(low=1e6, high=2e6)},
    ),
    "DefectPenalty": Entry(
        "defect_penalty",
        {
            "all": lambda: DefectPenalty(0.5, boxes=2, run=4),
            "boxes": lambda: DefectPenalty(0.5, None, 2, None, scripts=False),
            "scheduled": lambda: DefectPenalty(Schedule("linear", 0.0, 1.0, 8), boxes=2),
        },
        {"cost 0": lambda: DefectPenalty(0.0), "nothing": lambda: DefectPenalty(1.0, None, None, None, False)},
    ),
    "EntropyAdvantage": Entry(
        "entropy_advantage",
        {
            "phase": lambda: EntropyAdvantage(),
            "mini-batch": lambda: EntropyAdvantage(0.1, scope="mini_batch"),
            "micro-batch": lambda: EntropyAdvantage(scope="micro_batch"),
            "scheduled": lambda: EntropyAdvantage(Schedule("cosine", 0.0, 0.4, 9)),
        },
        {"alpha 0": lambda: EntropyAdvantage(0.0)},
    ),
    "EntropyBonus": Entry(
        "entropy_bonus",
        {
            "constant": lambda: EntropyBonus(),
            "scheduled": lambda: EntropyBonus(Schedule("linear", 0.1, 0.0, 8)),
            "adaptive": lambda: EntropyBonus(0.1, target=1.0, delta=0.05),
        },
        {"coefficient 0": lambda: EntropyBonus(0.0), "above the target": lambda: EntropyBonus(0.1, target=-1.0)},
    ),
    "KLCov": Entry(
        "kl_cov",
        {
            "mini-batch": lambda: KLCov(0.2),
            "micro-batch": lambda: KLCov(0.2, 0.5, scope="micro_batch"),
            "scheduled": lambda: KLCov(0.2, Schedule("linear", 0.0, 1.0, 8)),
        },
        {"ratio 0": lambda: KLCov(0.0), "coefficient 0": lambda: KLCov(0.2, 0.0)},
    ),
    "MaskTruncated": Entry("mask_truncated", {"the only way": lambda: MaskTruncated()}, {}),
    "NegativeReinforcement": Entry(
        "negative_reinforcement",
        {"weighted": lambda: NegativeReinforcement(), "negative only": lambda: NegativeReinforcement(0.0, -1.0)},
        {"the outcome itself": lambda: NegativeReinforcement(1.0, 0.0)},
    ),
    "PositiveNegative": Entry(
        "positive_negative",
        {
            "negative only": lambda: PositiveNegative(positive=0.0),
            "positive only": lambda: PositiveNegative(negative=0.0),
            "weighted": lambda: PositiveNegative(0.5, 2.0),
            "scheduled": lambda: PositiveNegative(Schedule("linear", 0.0, 1.0, 8)),
        },
        {"both 1": lambda: PositiveNegative()},
    ),
    "TruncatedImportance": Entry(
        "truncated_importance",
        {
            "token": lambda: TruncatedImportance(),
            "token, mask": lambda: TruncatedImportance(above="mask"),
            "sequence": lambda: TruncatedImportance(level="sequence"),
            "sequence, mask": lambda: TruncatedImportance(level="sequence", above="mask"),
        },
        {},
    ),
    "ZeroVariance": Entry(
        "zero_variance",
        {
            "phase": lambda: ZeroVariance(),
            "mini-batch": lambda: ZeroVariance(0.2, "mini_batch"),
            "scheduled": lambda: ZeroVariance(Schedule("linear", 0.0, 0.2, 8)),
        },
        {},
    ),
    "EntropyTopK": Entry(
        "entropy_topk",
        {
            "top": lambda: EntropyTopK(rho=0.3),
            "top, all": lambda: EntropyTopK(rho=0.3, normalize="all"),
            "bottom": lambda: EntropyTopK(rho=0.6, select="bottom"),
            "bottom, all": lambda: EntropyTopK(rho=0.6, select="bottom", normalize="all"),
            "random": lambda: EntropyTopK(rho=0.5, select="random"),
            "random, all": lambda: EntropyTopK(rho=0.5, select="random", normalize="all"),
            "band": lambda: EntropyTopK(select="band", band=[0.3, 0.7]),
            "quantile": lambda: EntropyTopK(rho=0.3, rule="quantile"),
            "scheduled": lambda: EntropyTopK(Schedule(start=0.9, end=0.1, phases=8)),
            "mini-batch": lambda: EntropyTopK(rho=0.3, source="current", scope="mini_batch"),
            "paper_v2": lambda: EntropyTopK(rho=0.3, preset="paper_v2"),
            "paper_v1": lambda: EntropyTopK(rho=0.3, preset="paper_v1"),
            "trl": lambda: EntropyTopK(rho=0.3, preset="trl"),
            "each rank": lambda: EntropyTopK(rho=0.3, ranks="local"),
        },
        {
            "top": lambda: EntropyTopK(rho=1.0),
            "bottom, all": lambda: EntropyTopK(rho=1.0, select="bottom", normalize="all"),
            "random": lambda: EntropyTopK(rho=1.0, select="random"),
            "band": lambda: EntropyTopK(select="band", band=[0.0, 1.0]),
            "paper_v2": lambda: EntropyTopK(rho=1.0, preset="paper_v2"),
            "trl": lambda: EntropyTopK(rho=1.0, preset="trl"),
        },
    ),
    "PerplexityShaping": Entry(
        "perplexity",
        {
            "low": lambda: PerplexityShaping(alpha=0.1),
            "high": lambda: PerplexityShaping(alpha=0.1, favour="high"),
            "scheduled": lambda: PerplexityShaping(Schedule("cosine", 0.0, 0.2, 9)),
        },
        {"alpha 0": lambda: PerplexityShaping(alpha=0.0)},
    ),
    "PositionShaping": Entry(
        "position",
        {
            "end": lambda: PositionShaping(gamma=0.4),
            "window": lambda: PositionShaping(first_step=5, last_step=5),
            "scheduled": lambda: PositionShaping(Schedule(start=0.0, end=0.4, phases=9)),
        },
        {
            "gamma 0": lambda: PositionShaping(gamma=0.0),
            "cap 0": lambda: PositionShaping(cap=0.0),
            "before its window": lambda: PositionShaping(first_step=6),
        },
    ),
    "StageDetector": Entry(
        "stage",
        {
            "detect": lambda: StageDetector(window=1, patience=2, drop=0.9, smoothing=0.7),
            "fixed": lambda: StageDetector(at_step=6),
        },
        {"defaults": lambda: StageDetector(), "plateau": lambda: StageDetector(at_step=0)},
    ),
}
STEP = 5
"""The rollout phase in which the laws are tried."""

active = pytest.mark.parametrize(
    "make", [pytest.param(m, id=f"{n}: {i}") for n, entry in TABLE.items() for i, m in entry.active.items()]
)
neutral = pytest.mark.parametrize(
    "make", [pytest.param(m, id=f"{n}: {i}") for n, entry in TABLE.items() for i, m in entry.neutral.items()]
)
few = settings(max_examples=8, deadline=None, derandomize=True)


@dataclass(frozen=True)
class Outcome:
    """What a callback did in one phase: to rewards [B], credit and the loss of each token [B, T]."""

    rewards: Tensor
    credit: Credit
    penalty: Tensor
    metrics: dict[str, float]
    stage: str | None
    state: dict[str, Any]


def act(
    callback: CreditCallback, rollout: RolloutBatch, credit: Credit, reduce: Reduce | None = None, step: int = STEP
) -> Outcome:
    """One phase of one callback through the drivers, which check shape, finiteness, signs and the mask."""
    ctx, chain = CreditContext(step=step, update=7, reduce=reduce or LocalReduce(), seed=3), [callback]
    observe(chain, rollout, ctx)
    rewards = shape_rewards(chain, rollout, ctx)
    current = current_policy(rollout)
    ctx.current = current if callback.reads_current else None
    after = assign_credit(chain, rollout, credit, ctx, callback.scope)
    tokens = (t.double() for t in (current.logprobs, current.entropies, rollout.old_logprobs, after.advantage))
    penalty = penalties(chain, Tokens(*tokens), ctx) * rollout.response_mask
    return Outcome(rewards, after, penalty, ctx.metrics, ctx.stage, callback.state_dict())


def tensors(record: RolloutBatch | Credit) -> dict[str, Tensor]:
    """Copies of the record's tensors by name."""
    return {f.name: v.clone() for f in fields(record) if isinstance(v := getattr(record, f.name), Tensor)}


def assert_equal(one: Credit, other: Credit) -> None:
    """The same credit, bit by bit."""
    assert_close(tensors(one), tensors(other), rtol=0, atol=0)


def assert_same(one: Credit, other: Credit) -> None:
    """The same choice of tokens, bit by bit; advantages may differ in the order that sums were taken in."""
    assert torch.equal(one.weight, other.weight)
    assert torch.equal(one.count, other.count)
    assert torch.equal(held(one), held(other))
    assert_close(one.advantage, other.advantage)


def held(credit: Credit) -> Tensor:
    """How strongly tokens are held at the old policy, 0 where nothing holds them [B, T]."""
    return torch.zeros_like(credit.weight) if credit.kl_coef is None else credit.kl_coef


def test_every_callback_of_the_package_stands_in_the_table() -> None:
    """A new class needs an entry here, and with it a README row and a configuration."""
    assert sorted(TABLE) == sorted(lit_rlvr_callbacks.__all__)
    for name, entry in TABLE.items():
        for make in (*entry.active.values(), *entry.neutral.values()):
            assert type(make()) is getattr(lit_rlvr_callbacks, name)


@active
def test_the_instances_of_the_table_do_something(make: Make) -> None:
    """Otherwise the laws below would hold for nothing. A detector acts by naming stages."""
    rollout = random_rollout([4, 4, 3], 8, seed=1)
    credit = random_credit(rollout, seed=2)
    callback = make()
    if callback.stage() is None:
        after = act(callback, rollout, credit)
        changed = tensors(after.credit).keys() != tensors(credit).keys()
        changed |= any(not torch.equal(tensors(after.credit)[name], before) for name, before in tensors(credit).items())
        assert changed or not torch.equal(after.rewards, rollout.rewards) or bool(after.penalty.any())
    else:
        assert {act(callback, rollout, credit, step=step).stage for step in range(10)} == {"rising", "plateau"}


@active
@few
@given(phases())
def test_inputs_stay_as_they_are(make: Make, phase: tuple[RolloutBatch, Credit]) -> None:
    """Neither the facts nor the credit that came in are edited."""
    before = [tensors(record) for record in phase]
    act(make(), *phase)
    assert_close([tensors(record) for record in phase], before, rtol=0, atol=0)


@active
@few
@given(phases())
def test_the_output_is_lawful_credit(make: Make, phase: tuple[RolloutBatch, Credit]) -> None:
    """Shapes and dtypes kept, finite everywhere, weight and count at least 0 and 0 off the mask."""
    rollout, credit = phase
    outcome = act(make(), rollout, credit)
    assert outcome.rewards.dtype == rollout.rewards.dtype
    after = tensors(outcome.credit)
    for name, before in tensors(credit).items():
        assert after[name].shape == before.shape
        assert after[name].dtype == before.dtype
        assert bool(torch.isfinite(after[name]).all())
    for name in ("weight", "count"):
        assert bool((after[name] >= 0).all())
        assert not bool(after[name][~rollout.response_mask].any())


@active
@few
@given(phases(), st.randoms(use_true_random=False))
def test_permuting_rows_permutes_the_output(make: Make, phase: tuple[RolloutBatch, Credit], rng: Any) -> None:
    """Nothing depends on where a row stands."""
    rollout, credit = phase
    order = torch.tensor(rng.sample(range(len(rollout)), len(rollout)))
    one, other = act(make(), rollout, credit), act(make(), rollout.rows(order), credit.rows(order))
    assert_same(other.credit, one.credit.rows(order))
    assert torch.equal(other.rewards, one.rewards[order])
    assert_close(other.penalty, one.penalty[order])
    assert other.metrics == pytest.approx(one.metrics)


@active
@few
@given(phases(), st.integers(1, 9))
def test_more_padding_changes_nothing(make: Make, phase: tuple[RolloutBatch, Credit], extra: int) -> None:
    """The padding's own numbers are never read, and its credit stays 0."""
    rollout, credit = phase
    one = act(make(), rollout, credit)
    wide_rollout, wide_credit = widen(rollout, credit, extra)
    other = act(make(), wide_rollout, wide_credit)
    width = rollout.response_mask.shape[1]
    assert_same(Credit(*(t[:, :width] for t in tensors(other.credit).values())), one.credit)
    assert not any(bool(t[:, width:].any()) for t in tensors(other.credit).values())
    assert torch.equal(other.rewards, one.rewards)
    assert_close(other.penalty[:, :width], one.penalty)
    assert other.metrics == pytest.approx(one.metrics)


@active
@few
@given(phases(), st.lists(st.integers(0, 1), min_size=4, max_size=4))
def test_two_ranks_are_one_process(make: Make, phase: tuple[RolloutBatch, Credit], homes: list[int]) -> None:
    """Whole groups on each rank, each padded to its own longest row; a rank may be without rows."""
    if make().scope == "micro_batch":
        pytest.skip("what it chooses among is one forward pass of one rank")
    if getattr(make(), "ranks", "global") == "local":
        pytest.skip("it was asked to choose on each rank alone")
    rollout, credit = phase
    place = {int(draw): homes[i] for i, draw in enumerate(rollout.group.unique())}
    rows = [torch.tensor([i for i, d in enumerate(rollout.group.tolist()) if place[d] == r]).long() for r in (0, 1)]

    def rank(reduce: ThreadedReduce) -> Outcome:
        return act(make(), *narrow(rollout.rows(rows[reduce.rank]), credit.rows(rows[reduce.rank])), reduce)

    whole, parts = act(make(), rollout, credit), run_ranks(2, rank)
    for part, mine in zip(parts, rows, strict=True):
        assert_same(part.credit, narrow(rollout.rows(mine), whole.credit.rows(mine))[1])
        assert torch.equal(part.rewards, whole.rewards[mine])
        assert_close(part.penalty, whole.penalty[mine, : part.penalty.shape[1]])
        assert part.metrics == pytest.approx(whole.metrics)
        assert part.stage == whole.stage
    assert parts[0].metrics == parts[1].metrics
    assert parts[0].state == parts[1].state, "only rank 0's state is saved"


@active
@few
@given(st.lists(rollouts(groups=2, samples=3), min_size=2, max_size=5), st.integers(1, 4))
def test_saved_state_gives_the_same_output(make: Make, run: list[RolloutBatch], cut: int) -> None:
    """Plain values and tensors go through a checkpoint, and the run goes on as if it had not stopped."""
    phases_ = [(rollout, random_credit(rollout, seed), seed + STEP - 2) for seed, rollout in enumerate(run)]
    straight, stopped, cut = make(), make(), min(cut, len(run) - 1)
    for rollout, credit, step in phases_[:cut]:
        act(straight, rollout, credit, step=step)
        act(stopped, rollout, credit, step=step)
    file = io.BytesIO()
    torch.save(stopped.state_dict(), file)
    resumed = make()
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for rollout, credit, step in phases_[cut:]:
        one, other = (act(c, rollout, credit, step=step) for c in (straight, resumed))
        assert_equal(one.credit, other.credit)
        assert torch.equal(one.rewards, other.rewards)
        assert torch.equal(one.penalty, other.penalty)
        assert (one.metrics, one.stage, one.state) == (other.metrics, other.stage, other.state)


@neutral
@few
@given(phases())
def test_neutral_parameters_are_the_identity(make: Make, phase: tuple[RolloutBatch, Credit]) -> None:
    """Bit by bit."""
    outcome = act(make(), *phase)
    assert_equal(outcome.credit, phase[1])
    assert torch.equal(outcome.rewards, phase[0].rewards)
    assert not bool(outcome.penalty.any())


@active
@few
@given(phases())
def test_assign_twice_gives_the_same(make: Make, phase: tuple[RolloutBatch, Credit]) -> None:
    """Only ``observe`` changes state; nothing is drawn from a generator that moves on."""
    rollout, credit = phase
    callback = make()
    callback.observe(rollout, CreditContext(step=STEP))
    state, generator = callback.state_dict(), torch.get_rng_state()
    current = current_policy(rollout) if callback.reads_current else None
    contexts = [CreditContext(step=STEP, seed=3, current=current) for _ in range(2)]
    assert_equal(*(callback.assign(credit, rollout, ctx) for ctx in contexts))
    contexts = [CreditContext(step=STEP, seed=3) for _ in range(2)]
    assert torch.equal(*(callback.shape_rewards(rollout, rollout.rewards, ctx) for ctx in contexts))
    assert callback.state_dict() == state
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize("name", sorted(TABLE))
def test_it_is_documented(name: str) -> None:
    """A README row that names its configuration, and a configuration that makes an instance."""
    readme = (ROOT / "callbacks/README.md").read_text()
    rows = [line for line in readme.splitlines() if line.startswith(f"| `{name}` |")]
    assert len(rows) == 1
    file = f"configs/callbacks/{TABLE[name].config}.yaml"
    assert f"({Path('..') / file})" in rows[0]
    assert yaml.safe_load((ROOT / file).read_text())["trainer"]["callbacks+"][0]["class_path"] == name


@pytest.mark.parametrize("file", sorted((ROOT / "configs/callbacks").iterdir()), ids=lambda file: file.name)
def test_every_configuration_adds_a_callback(file: Path) -> None:
    """A comment on top, one entry for the list, and options that the class takes."""
    text = file.read_text()
    fragment = yaml.safe_load(text)
    assert text.startswith("# ")
    (entry,) = fragment["trainer"].pop("callbacks+")
    made = getattr(lit_rlvr_callbacks, entry["class_path"])(**entry["init_args"])
    needed = fragment.pop("model", None)
    assert fragment == {"trainer": {}}
    if made.scope == "micro_batch":
        assert list(needed) == ["batch"]
        assert list(needed["batch"]) == ["micro_rows"]
    else:
        assert needed is None
    assert {key: getattr(made, key) for key in entry["init_args"]} == entry["init_args"]
