"""The hook protocol: who is called when, what is refused, and who is named when a law of credit is broken."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from rollouts import build_rollout, full_credit, run_chain
from torch import Tensor
from torch.testing import assert_close

from lit_rlvr.credit import CreditCallback, CreditContext, credit_chain, describe_chain
from lit_rlvr.types import Credit, RolloutBatch

ROLLOUT = build_rollout([[0.1, 0.2, 0.3], [0.4]])
CREDIT = full_credit(ROLLOUT)
OFF = (1, 2)
"""A place outside the responses of ROLLOUT."""


class Recorder(CreditCallback):
    """Writes down its calls."""

    def __init__(self, calls: list[str], stages: list[str] | None = None, name: str | None = None) -> None:
        super().__init__(stages, name)
        self.calls = calls

    def observe(self, rollout: RolloutBatch, ctx: CreditContext) -> None:
        self.calls.append(f"{self.name} observes")

    def assign(self, credit: Credit, rollout: RolloutBatch, ctx: CreditContext) -> Credit:
        self.calls.append(f"{self.name} assigns in {ctx.stage}")
        return credit


class Detector(Recorder):
    """Names a stage that it learns of in ``observe``."""

    def __init__(self, calls: list[str], next_stage: str, name: str | None = None) -> None:
        super().__init__(calls, None, name)
        self.next_stage, self.now = next_stage, "rising"

    def observe(self, rollout: RolloutBatch, ctx: CreditContext) -> None:
        super().observe(rollout, ctx)
        self.now = self.next_stage

    def stage(self) -> str:
        return self.now


class Affine(CreditCallback):
    """weight <- weight * factor + shift on the response."""

    def __init__(self, factor: float, shift: float, name: str) -> None:
        super().__init__(None, name)
        self.factor, self.shift = factor, shift

    def assign(self, credit: Credit, rollout: RolloutBatch, ctx: CreditContext) -> Credit:
        return replace(credit, weight=(credit.weight * self.factor + self.shift) * rollout.response_mask)


class Breaker(CreditCallback):
    """Returns credit with one tensor replaced."""

    def __init__(self, what: str, value: Any) -> None:
        super().__init__(None, "Guilty")
        self.what, self.value = what, value

    def assign(self, credit: Credit, rollout: RolloutBatch, ctx: CreditContext) -> Credit:
        tensors = {n: getattr(credit, n) for n in ("advantage", "weight", "count")}
        return Credit(**{**tensors, self.what: self.value})


class Logger(CreditCallback):
    """Logs the names that it is given, in ``observe`` and in ``assign``."""

    def __init__(self, observed: list[str], assigned: list[str], name: str | None = None) -> None:
        super().__init__(None, name)
        self.observed, self.assigned = observed, assigned

    def observe(self, rollout: RolloutBatch, ctx: CreditContext) -> None:
        for number, key in enumerate(self.observed):
            ctx.log(key, number)

    def assign(self, credit: Credit, rollout: RolloutBatch, ctx: CreditContext) -> Credit:
        for number, key in enumerate(self.assigned):
            ctx.log(key, 10 + number)
        return credit


def changed(tensor: Tensor, place: tuple[int, int], value: float) -> Tensor:
    """A copy with one element changed."""
    copy = tensor.clone()
    copy[place] = value
    return copy


def test_all_observe_before_any_assigns_in_list_order() -> None:
    """The stage is the one that the detector names after it has observed, wherever it stands in the list."""
    calls: list[str] = []
    chain = [Recorder(calls, name="A"), Recorder(calls, name="B"), Detector(calls, "plateau", name="D")]
    assert run_chain(chain, ROLLOUT, CREDIT, CreditContext()) is CREDIT
    assert calls == [
        *("A observes", "B observes", "D observes"),
        *("A assigns in plateau", "B assigns in plateau", "D assigns in plateau"),
    ]


def test_each_link_gets_what_the_one_before_returned() -> None:
    """Doubling and adding one do not commute."""
    double, add = Affine(2, 0, "Double"), Affine(1, 1, "Add")
    both = run_chain([double, add], ROLLOUT, CREDIT, CreditContext())
    assert_close(both.weight, torch.tensor([[3.0, 3.0, 3.0], [3.0, 0.0, 0.0]]))
    other = run_chain([add, double], ROLLOUT, CREDIT, CreditContext())
    assert_close(other.weight, torch.tensor([[4.0, 4.0, 4.0], [4.0, 0.0, 0.0]]))


@pytest.mark.parametrize(
    ("stages", "stage", "acts"),
    [(["plateau"], "plateau", True), (["plateau"], "rising", False), (["rising", "plateau"], "rising", True),
     ([], "rising", True), (None, "plateau", True)],
)  # fmt: skip
def test_a_callback_acts_only_in_its_stages(stages: list[str] | None, stage: str, acts: bool) -> None:
    """It observes in every stage; no stages means all."""
    calls: list[str] = []
    chain = [Detector([], stage), Recorder(calls, stages, "A")]
    run_chain(chain, ROLLOUT, CREDIT, CreditContext())
    assert calls == ["A observes", f"A assigns in {stage}"][: 1 + acts]


def test_stage_is_none_without_a_detector() -> None:
    """A stage of an earlier phase does not stay in the context."""
    ctx = CreditContext(stage="plateau")
    calls: list[str] = []
    run_chain([Recorder(calls, name="A")], ROLLOUT, CREDIT, ctx)
    assert calls[-1] == "A assigns in None"
    assert ctx.stage is None


def test_the_base_class_changes_nothing() -> None:
    """A callback without methods is the identity and has no stage."""
    callback = CreditCallback()
    assert run_chain([callback], ROLLOUT, CREDIT, CreditContext()) is CREDIT
    assert callback.stage() is None
    assert callback.state_key == "CreditCallback"
    assert CreditCallback(name="mine").state_key == "mine"


def test_chain_keeps_order_and_leaves_other_callbacks_out() -> None:
    """Lightning's own callbacks are not credit callbacks."""
    a, b = Recorder([], name="b"), Recorder([], name="a")
    assert credit_chain([Callback(), a, Callback(), b]) == [a, b]
    assert credit_chain([]) == []


@pytest.mark.parametrize(
    ("chain", "message"),
    [
        ([Recorder([]), Recorder([])], "two credit callbacks are named Recorder; give each its own `name`"),
        ([Recorder([], name="x"), CreditCallback(name="x")], "named x;"),
        ([Detector([], "rising", "D1"), Detector([], "rising", "D2")], "D1 and D2 both name the stage"),
        ([Recorder([], ["plateau"], "Gated")], "Gated acts only in some stages, .* add StageDetector"),
    ],
)
def test_chains_that_do_not_go_together_are_refused(chain: list[CreditCallback], message: str) -> None:
    """The message names the callbacks and says what to do."""
    with pytest.raises(ValueError, match=message):
        credit_chain(chain)


def test_chains_that_go_together_are_accepted() -> None:
    """Two of one class under two names, and stages with one detector."""
    chain: list[CreditCallback] = [Recorder([], ["plateau"]), Recorder([], name="second"), Detector([], "rising")]
    assert credit_chain(chain) == chain


@pytest.mark.parametrize(
    ("stage", "hint"),
    [("plateua", "did you mean plateau"), ("risng", "did you mean rising"), ("7", "known are rising, ")],
)
def test_an_unknown_stage_is_refused_with_a_hint(stage: str, hint: str) -> None:
    """The nearest known stage, or all of them."""
    with pytest.raises(ValueError, match=f"there is no stage '{stage}'; {hint}"):
        CreditCallback(stages=["rising", stage])


ONES = CREDIT.weight


@pytest.mark.parametrize(
    ("what", "value", "message"),
    [
        ("advantage", changed(ONES, (0, 0), float("nan")), "advantage that is not finite"),
        ("advantage", changed(ONES, OFF, float("inf")), "advantage that is not finite"),
        ("weight", changed(ONES, (0, 1), float("inf")), "weight that is not finite"),
        ("count", changed(ONES, (0, 1), float("nan")), "count that is not finite"),
        ("weight", changed(ONES, (1, 0), -1e-9), "negative weight"),
        ("count", changed(ONES, (1, 0), -1e-9), "negative count"),
        ("weight", changed(ONES, OFF, 1e-9), "weight other than 0 outside the response"),
        ("count", changed(ONES, OFF, 1e-9), "count other than 0 outside the response"),
    ],
)
def test_a_broken_law_names_the_callback(what: str, value: Tensor, message: str) -> None:
    """The chain stops at the guilty one."""
    calls: list[str] = []
    chain = [Affine(1, 0, "Innocent"), Breaker(what, value), Recorder(calls, name="After")]
    with pytest.raises(ValueError, match=f"^Guilty returned a {message}$"):
        run_chain(chain, ROLLOUT, CREDIT, CreditContext())
    assert calls == ["After observes"]


def test_a_wrong_shape_names_the_callback() -> None:
    """All three tensors agree with each other, but not with the rollout."""

    class Transposer(CreditCallback):
        def assign(self, credit: Credit, rollout: RolloutBatch, ctx: CreditContext) -> Credit:
            return Credit(credit.advantage.T, credit.weight.T, credit.count.T)

    with pytest.raises(ValueError, match=r"^Transposer returned advantage of shape \(3, 2\), expected \(2, 3\)$"):
        run_chain([Transposer()], ROLLOUT, CREDIT, CreditContext())


def test_a_forgotten_return_names_the_callback() -> None:
    """The commonest slip of a first callback."""

    class Forgetful(CreditCallback):
        def assign(self, credit: Credit, rollout: RolloutBatch, ctx: CreditContext) -> Credit:
            return None  # type: ignore[return-value]

    with pytest.raises((TypeError, ValueError), match="Forgetful"):
        run_chain([Forgetful()], ROLLOUT, CREDIT, CreditContext())


def test_a_negative_advantage_is_lawful() -> None:
    """Only weight and count have a sign to keep; an advantage outside the response is harmless."""
    value = changed(-ONES, OFF, -3.0)
    assert run_chain([Breaker("advantage", value)], ROLLOUT, CREDIT, CreditContext()).advantage is value


def test_metrics_carry_the_name_of_the_callback() -> None:
    """Two callbacks may use one metric name."""
    ctx = CreditContext()
    chain = [Logger(["x"], ["y"], "A"), Logger(["x"], [], "B")]
    run_chain(chain, ROLLOUT, CREDIT, ctx)
    assert ctx.metrics == {"credit/A/x": 0.0, "credit/A/y": 10.0, "credit/B/x": 0.0}
    assert all(type(value) is float for value in ctx.metrics.values())


@pytest.mark.parametrize(("observed", "assigned"), [(["x", "x"], []), ([], ["x", "x"]), (["x"], ["x"])])
def test_a_metric_logged_twice_is_refused(observed: list[str], assigned: list[str]) -> None:
    """Within one hook or across the two."""
    with pytest.raises(ValueError, match="the metric credit/A/x is logged twice"):
        run_chain([Logger(observed, assigned, "A")], ROLLOUT, CREDIT, CreditContext())


def test_describe_chain() -> None:
    """Names in list order, stages in brackets."""
    chain = [Detector([], "rising", "Stage"), Recorder([], name="A"), Recorder([], ["rising", "plateau"], "B")]
    assert describe_chain(chain) == "credit: Stage → A → B[rising|plateau]"
    assert describe_chain([]) == "credit: every response token learns"
