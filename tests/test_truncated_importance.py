"""TruncatedImportance against hand-computed values and the rule of TRL in NumPy."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lit_rlvr_callbacks import TruncatedImportance
from rollouts import build_rollout, full_credit, phases
from torch.testing import assert_close

from lit_rlvr.credit import CreditContext, assign_credit
from lit_rlvr.engines import InProcessEngine
from lit_rlvr.types import Credit, RolloutBatch

near = partial(assert_close, check_dtype=False)
LOG2 = math.log(2)
TWO = replace(
    build_rollout([[0.5] * 3, [0.5] * 2], [[-1.0, -1.0, -1.0], [-1.0, -1.0]]),
    engine_logprobs=torch.tensor([[-1.0 - LOG2, -1.0 - 2 * LOG2, -1.0 + LOG2], [-1.0 + LOG2, -1.0, 0.0]]),
)
"""Ratios 2, 4, 1/2 and 1/2, 1: 4 and 1/2 for the responses."""


def assigned(rollout: RolloutBatch, credit: Credit, *args: Any) -> tuple[Credit, dict[str, float]]:
    """What the callback makes of a phase."""
    ctx = CreditContext()
    return assign_credit([TruncatedImportance(*args)], rollout, credit, ctx), ctx.metrics


@pytest.mark.parametrize(
    ("level", "above", "weight", "mean", "truncated"),
    [
        ("token", "truncate", [[2, 3, 0.5], [0.5, 1, 0]], 7 / 5, 1 / 5),
        ("token", "mask", [[2, 0, 0.5], [0.5, 1, 0]], 4 / 5, 1 / 5),
        ("sequence", "truncate", [[3, 3, 3], [0.5, 0.5, 0]], 10 / 5, 3 / 5),
        ("sequence", "mask", [[0, 0, 0], [0.5, 0.5, 0]], 1 / 5, 3 / 5),
    ],
)
def test_by_hand(level: str, above: str, weight: list[list[float]], mean: float, truncated: float) -> None:
    """A cap of 3; the count stays."""
    credit = full_credit(TWO)
    after, metrics = assigned(TWO, credit, 3.0, level, above)
    near(after.weight, torch.tensor(weight))
    assert after.count is credit.count
    assert after.advantage is credit.advantage
    assert metrics == {
        "credit/TruncatedImportance/mean_weight": pytest.approx(mean),
        "credit/TruncatedImportance/truncated": pytest.approx(truncated),
    }
    assert TruncatedImportance(3.0, level, above).token_level == (level == "token")  # type: ignore[arg-type]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(phases(), st.floats(0.1, 5), st.sampled_from(["token", "sequence"]), st.sampled_from(["truncate", "mask"]))
def test_against_numpy(phase: tuple[RolloutBatch, Credit], cap: float, level: str, above: str) -> None:
    """TRL's modes: the masked difference, summed over the response or not, then clamped or set to 0 above the cap."""
    rollout, credit = phase
    assert rollout.engine_logprobs is not None
    mask = rollout.response_mask.numpy()
    difference = (rollout.old_logprobs.double() - rollout.engine_logprobs.double()).numpy() * mask
    ratio = np.exp(difference if level == "token" else difference.sum(-1, keepdims=True))
    ratio = np.minimum(ratio, cap) if above == "truncate" else np.where(ratio > cap, 0.0, ratio)
    after, _ = assigned(rollout, credit, cap, level, above)
    near(after.weight.numpy(), (credit.weight.double().numpy() * ratio).astype("float32"))


def test_equal_probabilities_change_nothing() -> None:
    """And a ratio beyond what a float holds is the cap, not a broken run."""
    credit = full_credit(TWO)
    same = replace(TWO, engine_logprobs=TWO.old_logprobs)
    assert torch.equal(assigned(same, credit)[0].weight, credit.weight)
    far = replace(TWO, engine_logprobs=torch.full((2, 3), -5000.0))
    assert assigned(far, credit, 2.0, "sequence")[0].weight.tolist() == [[2, 2, 2], [2, 2, 0]]


def test_an_exact_engine_is_refused() -> None:
    """There is nothing to correct; the in-process engine in bfloat16 is another matter."""
    trainer = SimpleNamespace(precision="32-true", strategy=None)
    module: Any = SimpleNamespace(engine=InProcessEngine(), trainer=trainer, dtype_name="float32")
    with pytest.raises(ValueError, match=r"^TruncatedImportance would change nothing: engine InProcessEngine reports"):
        TruncatedImportance().check(module)
    with pytest.raises(ValueError, match="TruncatedImportance needs the engine's log-probabilities"):
        assigned(replace(TWO, engine_logprobs=None), full_credit(TWO))
    module.dtype_name = "bfloat16"
    TruncatedImportance().check(module)


def test_an_inexact_engine_is_accepted() -> None:
    class Other(InProcessEngine):
        def exact(self, precision: str) -> bool:
            return False

    trainer = SimpleNamespace(precision="32-true", strategy=None)
    module: Any = SimpleNamespace(engine=Other(), trainer=trainer, dtype_name="float32")
    TruncatedImportance().check(module)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cap": 0.0}, "cap is the largest ratio and must be > 0, got 0.0"),
        ({"level": "response"}, "level must be token or sequence and above truncate or mask; got 'response'"),
        ({"above": "clip"}, "got 'token' and 'clip'"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TruncatedImportance(**options)
