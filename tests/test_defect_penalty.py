"""DefectPenalty: each rule by hand, what it costs, and what is logged."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import groupby
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lit_rlvr_callbacks import DefectPenalty
from rollouts import build_rollout, full_credit

from lit_rlvr.credit import CreditContext, assign_credit, observe, shape_rewards
from lit_rlvr.tasks import Prompt
from lit_rlvr.types import RolloutBatch


def rollout_of(*texts: str, questions: tuple[str, ...] = ()) -> RolloutBatch:
    """One response of two tokens per text."""
    rollout = build_rollout([[0.5, 0.5]] * len(texts))
    prompts = tuple(Prompt(i, question) for i, question in enumerate(questions))
    return replace(rollout, texts=texts, prompts=prompts, rewards=torch.ones(len(texts)))


def run(callback: DefectPenalty, rollout: RolloutBatch, advantage: list[float]) -> tuple[list[float], dict[str, float]]:
    """The rewards, and what is logged without its prefix."""
    ctx = CreditContext()
    observe([callback], rollout, ctx)
    rewards = shape_rewards([callback], rollout, ctx)
    credit = full_credit(rollout, advantage)
    assert assign_credit([callback], rollout, credit, ctx) is credit
    return rewards.tolist(), {name.rpartition("/")[2]: value for name, value in ctx.metrics.items()}


@pytest.mark.parametrize(
    ("text", "question", "found"),
    [
        ("", "", [False] * 4),
        ("The answer is \\boxed{7}.", "", [False] * 4),
        # 3 of 9 three-word sequences stood there before, then 4 of 10.
        ("a b c d e a b c d e x", "", [False] * 4),
        ("a b c d e a b c d e a b", "", [True, False, False, False]),
        ("boxed{1}" * 4, "", [False] * 4),
        ("boxed{1}" * 5, "", [False, True, False, False]),
        ("=" * 499, "", [False] * 4),
        ("x" + "\n" * 500, "", [False, False, True, False]),
        ("so \u7b54\u6848 is 7", "What is 3 + 4?", [False, False, False, True]),
        ("so \u7b54\u6848 is 7", "3 + 4 \u662f\u591a\u5c11?", [False] * 4),
        ("\u0441\u043b\u043e\u0432\u043e caf\u00e9 \u2200x", "", [False] * 4),
        ("\u7b54 " * 20 + "boxed{" * 5, "", [True, True, False, True]),
    ],
)
def test_each_rule_by_hand(text: str, question: str, found: list[bool]) -> None:
    """Thresholds of the paper's code: > .35, >= 5, >= 500."""
    assert DefectPenalty().defects(text, question) == found


def test_a_share_at_the_threshold_is_no_defect() -> None:
    """Two equal sequences of three words: one half repeats."""
    assert not DefectPenalty(repetition=0.5).defects("a a a a")[0]
    assert DefectPenalty(repetition=0.499).defects("a a a a")[0]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.text("ab \n", max_size=40), st.floats(0, 1), st.integers(2, 6))
def test_against_a_plain_count(text: str, repetition: float, length: int) -> None:
    """Repeats counted one by one, runs by grouping."""
    words = text.split()
    counts = Counter(tuple(words[i : i + 3]) for i in range(len(words) - 2))
    repeats = sum(count - 1 for count in counts.values()) / max(1, len(words) - 2)
    longest = max((len(list(run)) for _, run in groupby(text)), default=0)
    found = DefectPenalty(repetition=repetition, run=length).defects(text)
    if abs(repeats - repetition) > 1e-9:
        assert found[0] == (repeats > repetition)
    assert found[2] == (longest >= length)


def test_a_defect_costs_once_and_kinds_are_logged_apart() -> None:
    """By the sign of the advantage too; a response without advantage is in neither."""
    rollout = rollout_of("fine", "boxed{" * 5, "\u7b54 " * 20, "x" * 500)
    rewards, logged = run(DefectPenalty(0.25), rollout, [1.0, -1.0, -1.0, 0.0])
    assert rewards == [1.0, 0.75, 0.75, 0.75]
    assert logged == {
        "repetition": 0.25, "boxes": 0.25, "run": 0.25, "scripts": 0.25,
        "repetition_positive": 0.0, "boxes_positive": 0.0, "run_positive": 0.0, "scripts_positive": 0.0,
        "repetition_negative": 0.5, "boxes_negative": 0.5, "run_negative": 0.0, "scripts_negative": 0.5,
    }  # fmt: skip


def test_rules_can_be_switched_off() -> None:
    """And without a cost it only counts."""
    everything = "\u7b54 " * 20 + "boxed{" * 5 + "x" * 500
    rollout = rollout_of(everything)
    assert run(DefectPenalty(1.0, None, None, None, False), rollout, [1.0])[0] == [1.0]
    rewards, logged = run(DefectPenalty(0.0), rollout, [1.0])
    assert rewards == [1.0]
    assert [logged[kind] for kind in ("repetition", "boxes", "run", "scripts")] == [1, 1, 1, 1]


def test_the_prompt_says_which_script_is_expected() -> None:
    rollout = rollout_of("\u7b54", "\u7b54", questions=("How many?", "\u591a\u5c11?"))
    assert run(DefectPenalty(1.0), rollout, [1.0, 1.0])[0] == [0.0, 1.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cost": -1.0}, "DefectPenalty.cost is subtracted and must be >= 0, got -1.0"),
        ({"repetition": -0.1}, "needs repetition >= 0, boxes >= 1 and run >= 2, got -0.1, 5 and 500"),
        ({"boxes": 0}, "got 0.35, 0 and 500"),
        ({"run": 1}, "got 0.35, 5 and 1"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DefectPenalty(**options)
