"""Errors in plugged-in code: who is named, where, and what the command line prints."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rollouts import build_rollout, full_credit
from torch import Tensor

from lit_rlvr.advantages import Advantage
from lit_rlvr.aggregation import Aggregation, TokenMean
from lit_rlvr.blame import PluginError, blame
from lit_rlvr.cli_failures import sentence_about
from lit_rlvr.credit import CreditCallback, CreditContext, assign_credit, observe, penalties, shape_rewards
from lit_rlvr.losses import ClippedSurrogate
from lit_rlvr.meter import Meter
from lit_rlvr.minibatch import MiniBatch
from lit_rlvr.objective import TokenObjective
from lit_rlvr.phase import base_credit
from lit_rlvr.reduce import LocalReduce
from lit_rlvr.types import Credit, RolloutBatch, Tokens
from lit_rlvr.verify.pool import describe

ROLLOUT = build_rollout([[0.1, 0.2, 0.3], [0.4]])
CREDIT = full_credit(ROLLOUT)
TOKENS = Tokens(*torch.zeros(4, 5))
FILE = str(Path(__file__).resolve().relative_to(Path.cwd())) if Path(__file__).is_relative_to(Path.cwd()) else __file__


class Faulty(CreditCallback):
    """Raises in one hook."""

    def __init__(self, hook: str, error: Exception, name: str | None = None) -> None:
        super().__init__(None, name)

        def fail(*_: Any) -> Any:
            raise error

        setattr(self, hook, fail)


HOOKS = {
    "observe": lambda c: observe([c], ROLLOUT, CreditContext()),
    "stage": lambda c: observe([c], ROLLOUT, CreditContext()),
    "shape_rewards": lambda c: shape_rewards([c], ROLLOUT, CreditContext()),
    "assign": lambda c: assign_credit([c], ROLLOUT, CREDIT, CreditContext()),
    "penalty": lambda c: penalties([c], TOKENS, CreditContext()),
}


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("error", [RuntimeError("sizes"), KeyError("mask"), AttributeError("no x"), ValueError("bad")])
def test_an_error_in_a_hook_names_callback_hook_and_line(hook: str, error: Exception) -> None:
    with pytest.raises(PluginError) as caught:
        HOOKS[hook](Faulty(hook, error))
    said = rf"^Faulty\.{hook} raised {type(error).__name__} at {re.escape(FILE)}:\d+: {re.escape(str(error))}$"
    assert re.search(said, str(caught.value))
    assert caught.value.__cause__ is error


def test_a_forgotten_axis_is_told_with_its_line() -> None:
    """Weights [B] against [B, T]: the sentence is torch's, the line is the user's."""

    class Unsqueezed(CreditCallback):
        def assign(self, credit: Credit, rollout: RolloutBatch, ctx: CreditContext) -> Credit:
            return replace(credit, weight=credit.weight * rollout.rewards)

    line = Unsqueezed.assign.__code__.co_firstlineno + 1
    with pytest.raises(ValueError, match=rf"Unsqueezed\.assign raised RuntimeError at .*:{line}: The size of tensor"):
        assign_credit([Unsqueezed()], ROLLOUT, CREDIT, CreditContext())


def test_a_callback_with_a_name_of_its_own_is_told_by_both() -> None:
    with pytest.raises(PluginError, match=r"^second \(Faulty\)\.assign raised RuntimeError"):
        HOOKS["assign"](Faulty("assign", RuntimeError("x"), name="second"))


def test_what_an_author_calls_is_blamed_alone() -> None:
    told = r"^int\.inner raised TypeError at .*: x$"
    with pytest.raises(PluginError, match=told), blame("", "outer"), blame(0, "inner"):
        raise TypeError("x")


def test_an_interrupt_is_nobodys_fault() -> None:
    with pytest.raises(KeyboardInterrupt), blame(0, "x"):
        raise KeyboardInterrupt


def writes(record: str, name: str) -> CreditCallback:
    class Writer(CreditCallback):
        def assign(self, credit: Credit, rollout: RolloutBatch, ctx: CreditContext) -> Credit:
            getattr({"Credit": credit, "RolloutBatch": rollout}[record], name).mul_(1)
            return credit

    return Writer()


@pytest.mark.parametrize(("record", "name"), [("Credit", "weight"), ("Credit", "count"), ("RolloutBatch", "rewards")])
def test_writing_into_what_others_read_is_refused(record: str, name: str) -> None:
    rollout, credit = build_rollout([[0.1, 0.2]]), full_credit(build_rollout([[0.1, 0.2]]))
    with pytest.raises(ValueError, match=rf"^Writer writes into {record}\.{name}; return a new tensor"):
        assign_credit([writes(record, name)], rollout, credit, CreditContext())


def test_rewards_may_not_be_written_into() -> None:
    class Writer(CreditCallback):
        def shape_rewards(self, rollout: RolloutBatch, rewards: Tensor, ctx: CreditContext) -> Tensor:
            return rewards.sub_(1)

    with pytest.raises(ValueError, match=r"^Writer writes into RolloutBatch\.rewards"):
        shape_rewards([Writer()], build_rollout([[0.1]]), CreditContext())


@pytest.mark.parametrize("dtype", [torch.bool, torch.float64])
def test_a_dtype_other_than_before_is_refused(dtype: torch.dtype) -> None:
    class Caster(CreditCallback):
        def assign(self, credit: Credit, rollout: RolloutBatch, ctx: CreditContext) -> Credit:
            return replace(credit, weight=credit.weight.to(dtype))

    with pytest.raises(ValueError, match=f"^Caster returned weight of {dtype}, expected torch.float32"):
        assign_credit([Caster()], ROLLOUT, CREDIT, CreditContext())


@pytest.mark.parametrize(("value", "told"), [(torch.zeros(5, 1), r"a tensor of shape \(5, 1\)"), (0.5, "float")])
def test_a_penalty_of_another_shape_is_refused(value: Any, told: str) -> None:
    class Odd(CreditCallback):
        def penalty(self, tokens: Tokens, ctx: CreditContext) -> Any:
            return value

    with pytest.raises(ValueError, match=rf"^Odd returned from penalty {told}, expected"):
        penalties([Odd()], TOKENS, CreditContext())


@dataclass(frozen=True)
class OddAdvantage(Advantage):
    """Returns a column, or raises."""

    raises: bool = False

    def __call__(self, rewards: Tensor, group: Tensor, reduce: Any = None) -> Tensor:
        if self.raises:
            raise IndexError("out of range")
        return rewards[:, None]


class OddShare(Aggregation):
    """One share per response."""

    def share(self, mask: Tensor) -> Tensor:
        return mask.float().sum(-1)


@pytest.mark.parametrize(
    ("advantage", "aggregation", "told"),
    [
        (OddAdvantage(), TokenMean(), r"^OddAdvantage returned a tensor of shape \(2, 1\), expected \(2,\)$"),
        (OddAdvantage(True), TokenMean(), r"^OddAdvantage\.__call__ raised IndexError at .*: out of range$"),
        (
            lambda rewards, group, reduce: rewards,
            OddShare(),
            r"^OddShare\.share returned a tensor of shape \(2,\), exp",
        ),
    ],
)
def test_a_custom_advantage_or_aggregation_is_named(advantage: Any, aggregation: Aggregation, told: str) -> None:
    module: Any = SimpleNamespace(advantage=advantage, aggregation=aggregation)
    with pytest.raises(ValueError, match=told):
        base_credit(module, ROLLOUT, ROLLOUT.rewards[:, None] * ROLLOUT.response_mask, LocalReduce())


@dataclass(frozen=True)
class OddLoss(ClippedSurrogate):
    """A surrogate of a wrong shape, which would broadcast to all pairs of tokens."""

    raises: str = ""

    def surrogate(self, log_ratio: Tensor, advantage: Tensor) -> Tensor:
        if self.raises:
            raise TypeError(self.raises)
        return super().surrogate(log_ratio, advantage)[:, None]


@pytest.mark.parametrize(
    ("loss", "told"),
    [
        (OddLoss(), r"^OddLoss\.surrogate returned a tensor of shape \(4, 1\), expected \(4,\)$"),
        (OddLoss(raises="no"), rf"^OddLoss\.surrogate raised TypeError at {re.escape(FILE)}:\d+: no$"),
    ],
)
def test_a_custom_loss_is_named(loss: ClippedSurrogate, told: str) -> None:
    mini = MiniBatch.of(ROLLOUT, CREDIT, TokenMean(), LocalReduce())
    row, column = ROLLOUT.response_mask.nonzero(as_tuple=True)
    micro: Any = SimpleNamespace(row=row, column=column, ids=ROLLOUT.response_ids)
    objective = TokenObjective(mini, micro, loss, None, [], CreditContext(), 1.0, Meter())
    with pytest.raises(ValueError, match=told):
        objective(torch.zeros(4), torch.zeros(4), slice(None))


def test_the_command_line_shows_the_users_frames_and_no_others() -> None:
    with pytest.raises(PluginError) as caught:
        HOOKS["assign"](Faulty("assign", AttributeError("no such thing")))
    sentence, *frames, last = (sentence_about(caught.value, []) or "").splitlines()
    assert sentence == str(caught.value)
    assert re.fullmatch(rf'  File "{re.escape(__file__)}", line \d+, in fail', frames[0])
    assert frames[1].strip() == "raise error"
    assert last == "LIT_RLVR_DEBUG=1 shows the whole traceback"
    assert "lit_rlvr/credit.py" not in "".join(frames)


def test_an_error_in_other_code_of_the_user_is_told_with_its_line() -> None:
    def my_hook() -> None:
        raise IndexError("list index out of range")

    with pytest.raises(IndexError) as caught:
        my_hook()
    said = sentence_about(caught.value, []) or ""
    assert re.match(rf"my_hook raised IndexError at {re.escape(FILE)}:\d+: list index out of range\n", said)


def test_a_refusal_stays_a_sentence_and_a_mistake_of_ours_a_traceback() -> None:
    def raised(error: Exception) -> Exception:
        """As from code without a user's frame."""
        return error.with_traceback(None)

    assert sentence_about(raised(ValueError("batch.prompts must be at least 1")), []) == (
        "batch.prompts must be at least 1"
    )
    assert sentence_about(raised(IndexError("x")), []) is None


def test_a_verifiers_failure_has_its_line() -> None:
    with pytest.raises(ValueError, match="answer") as caught:
        raise ValueError("no\nanswer")
    assert re.fullmatch(rf"ValueError: no answer \({re.escape(FILE)}:\d+\)", describe(caught.value))
