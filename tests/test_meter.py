"""What is logged of an optimiser step, against picking the tokens and taking their means."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from lit_rlvr_callbacks import PerplexityShaping
from rollouts import full_credit, random_rollout, run_ranks
from runs import tiny_module, train
from torch import Tensor

from lit_rlvr import Batch, CreditContext
from lit_rlvr.aggregation import TokenMean
from lit_rlvr.engines import InProcessEngine
from lit_rlvr.kl import KLPenalty
from lit_rlvr.layout import Reader
from lit_rlvr.losses import ClippedSurrogate
from lit_rlvr.meter import Meter
from lit_rlvr.microbatch import cut
from lit_rlvr.minibatch import MiniBatch
from lit_rlvr.objective import TokenObjective
from lit_rlvr.reduce import LocalReduce


def test_sums_and_extremes_over_chunks_and_ranks() -> None:
    """The second rank has seen no token. Of an engine's ratios none need be 1; with those that learn, 1 is counted."""

    def work(reduce: Any) -> dict[str, float]:
        meter = Meter()
        meter.add(rows=4.0)
        if reduce.rank == 0:
            for ratio in ([1.5, 3.0], [2.0]):
                log_ratio = torch.tensor(ratio).log()
                meter.add(tokens=torch.tensor(len(ratio)), ratio=log_ratio.exp().sum(), entropy=torch.tensor(1.0))
                meter.add(engine_ratio=(log_ratio + 1).exp().sum(), engine_tokens=float(len(ratio)))
                meter.extremes(ratio=log_ratio, engine_ratio=log_ratio + 1)
            meter.extremes(ratio=torch.zeros(0))
        return meter.read(reduce)

    first, second = run_ranks(2, work)
    assert first == second
    expected = {
        "train/tokens": 3, "train/ratio": 6.5 / 3, "train/ratio_max": 3, "train/ratio_min": 1,
        "train/entropy": 2 / 3, "train/engine_ratio": 6.5 / 3 * math.e, "train/engine_ratio_max": 3 * math.e,
        "train/engine_ratio_min": 1.5 * math.e, "train/skipped_rows": 8,
    }  # fmt: skip
    assert {name: first[name] for name in expected} == pytest.approx(expected, rel=1e-6)  # logarithms are float32
    assert "train/kl_ref" not in first


def test_a_step_without_tokens_has_a_ratio_of_one() -> None:
    metrics = Meter().read(LocalReduce())
    assert (metrics["train/ratio_max"], metrics["train/ratio_min"], metrics["train/tokens"]) == (1, 1, 0)
    assert not any("engine" in name for name in metrics)


def test_tokens_that_do_not_learn_leave_no_trace() -> None:
    """Not even an impossible one, whose ratio is 0 or infinite and whose entropy is not a number."""
    rollout = random_rollout([4, 4], 8, seed=1)
    credit = full_credit(rollout, [1.0, -1.0] * 4)
    credit = replace(credit, weight=credit.weight * (rollout.entropies > 0))
    mini = MiniBatch.of(rollout, credit, TokenMean(), LocalReduce())
    ((micro, _),) = cut(rollout, rollout.response_mask, 10**6, None, Reader(torch.device("cpu")), LocalReduce())
    learns = credit.weight[micro.row, micro.column] > 0
    old, advantage = (t[micro.row, micro.column] for t in (rollout.old_logprobs, credit.advantage))
    logprobs = old + torch.sin(torch.arange(len(old)))
    ratio = (logprobs - old).exp()[learns].double()
    strange = (~learns).nonzero().squeeze(-1)
    assert len(strange) > 3
    logprobs[strange[0]], logprobs[strange[1]], logprobs[strange[2]] = -torch.inf, torch.inf, torch.nan
    entropies = torch.where(learns, 1.5, torch.nan)
    meter = Meter()
    objective = TokenObjective(mini, micro, ClippedSurrogate(), None, [], CreditContext(), 1.0, meter)
    objective(logprobs, entropies, slice(None))
    positive = advantage[learns] > 0
    metrics = meter.read(LocalReduce())
    expected = {
        "train/tokens": int(learns.sum()),
        "train/ratio": ratio.mean(),
        "train/ratio_max": ratio.max(),
        "train/ratio_min": ratio.min(),
        "train/kl_old": (1 / ratio + ratio.log() - 1).mean(),
        "train/entropy": 1.5,
        "train/clip_low": ((ratio < 0.8) & ~positive).double().mean(),
        "train/clip_high": ((ratio > 1.28) & positive).double().mean(),
    }
    wanted = {name: float(value) for name, value in expected.items()}
    assert {name: metrics[name] for name in expected} == pytest.approx(wanted, rel=1e-6)


def off_by(ids: Tensor) -> Tensor:
    """How far the engine below is from the policy, in nats."""
    return 0.1 * (ids % 7) - 0.4


class OffEngine(InProcessEngine):
    """An engine whose log-probabilities are off by something that differs from token to token."""

    def exact(self, precision: str) -> bool:
        return False

    def generate(self, *args: Any) -> Any:
        out = super().generate(*args)
        return replace(out, logprobs=(out.logprobs + off_by(out.ids)) * out.mask, entropies=None)


def ratios(metrics: dict[str, float], where: str) -> list[float]:
    """Mean, maximum and minimum of the engine's ratios."""
    return [metrics[f"{where}/engine_ratio{end}"] for end in ("", "_max", "_min")]


@pytest.mark.parametrize("everything", [True, False])
def test_an_engine_is_measured_by_the_training_forward(everything: bool) -> None:
    """Where no scoring pass is taken: over all response tokens if all of them enter the loss, else those that learn."""
    batch, kl = Batch(prompts=6, responses=2, micro_tokens=40), KLPenalty(0.1) if everything else None
    module = tiny_module(batch=batch, engine=OffEngine(), kl=kl)
    (metrics,) = train(module, 1).metrics
    assert module.phase is not None
    facts, credit = module.phase.rollout, module.phase.credit
    measured = facts.response_mask if everything else credit.learns
    assert everything or 0 < measured.sum() < facts.response_mask.sum()
    expected = (-off_by(facts.response_ids[measured])).double().exp()
    by_hand = [float(x) for x in (expected.mean(), expected.max(), expected.min())]
    # The engine's numbers are float32: of a log-probability of some 4 nats, 2^-23 of itself.
    assert ratios(metrics, "train") == pytest.approx(by_hand, rel=1e-5)
    assert "rollout/engine_ratio" not in metrics
    assert metrics["train/ratio"] == 1
    if everything:  # a scoring pass says the same of the same rollouts
        (scored,) = train(tiny_module(batch=batch, engine=OffEngine(), kl=kl), 1, PerplexityShaping(0.3)).metrics
        assert ratios(scored, "rollout") == pytest.approx(by_hand, rel=1e-5)
        assert "train/engine_ratio" not in scored


def test_an_exact_engine_is_not_measured() -> None:
    (metrics,) = train(tiny_module(batch=Batch(prompts=4, responses=4)), 1).metrics
    assert not any("engine_ratio" in name for name in metrics)
