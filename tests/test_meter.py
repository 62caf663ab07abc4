"""What is logged of an optimiser step, against picking the tokens and taking their means."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from rollouts import full_credit, random_rollout, run_ranks

from lit_rlvr import CreditContext
from lit_rlvr.aggregation import TokenMean
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
    ((micro, _),) = cut(rollout, rollout.response_mask, 10**6, None, torch.device("cpu"), LocalReduce())
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
