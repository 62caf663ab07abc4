"""Rollouts whose graphs fail go on without them, and no rollout leaves anything behind."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from captured import schedule
from fake_cuda import FakeCuda
from tape import TapeRecorder
from test_scheduler import LONG, PROMPTS, TOKENIZER, UID, make_policy, output, plainly, same
from torch.multiprocessing.reductions import StorageWeakRef

from lit_rlvr.engines import InProcessEngine, graphs, in_process
from lit_rlvr.engines import scheduler as scheduling
from lit_rlvr.engines.capture import CaptureError, Replay
from lit_rlvr.engines.graph_draws import DrawGraphs
from lit_rlvr.engines.graph_steps import StepGraphs
from lit_rlvr.engines.slots import SlotCache

pytestmark = pytest.mark.usefixtures("unread")
STEPS, DRAWS = "decoding steps", "draws of tokens"


class Failing:
    """Makes recorders of which one fails, after it has run the function once as CUDA's does."""

    def __init__(self, purpose: str, good: int) -> None:
        self.purpose, self.good = purpose, good
        self.failures = 0

    def __call__(self, purpose: str) -> Any:
        """One more."""
        return FailingRecorder(self) if purpose == self.purpose else TapeRecorder(purpose)


class FailingRecorder(TapeRecorder):
    """Fails after some good ones."""

    def __init__(self, shared: Failing) -> None:
        super().__init__(shared.purpose)
        self.shared = shared

    def record(self, run: Callable[[], None]) -> Replay:
        """See :class:`lit_rlvr.engines.capture.Recorder`."""
        if self.shared.good == 0:
            run()
            self.shared.failures += 1
            raise CaptureError(f"{self.purpose} cannot be captured as CUDA graphs (for a reason)")
        self.shared.good -= 1
        return super().record(run)


@pytest.mark.parametrize(("purpose", "good"), [(STEPS, 0), (STEPS, 1), (STEPS, 3), (DRAWS, 0), (DRAWS, 1)])
def test_a_capture_that_fails(
    purpose: str, good: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The first or a later one, of steps or of draws: one warning, no second attempt, and the same responses."""
    monkeypatch.setattr(graphs, "SPARE", 16)
    monkeypatch.setattr(graphs, "PATIENCE", 0)
    policy, failing = make_policy(), Failing(purpose, good)
    wanted, _ = schedule(policy, None, 12)
    got, scheduler = schedule(policy, failing, 12)
    same(got, wanted)
    assert failing.failures == 1
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    reason = f"{purpose} cannot be captured as CUDA graphs (for a reason)"
    assert said == [f"{reason}; this rollout goes on without"]
    draws = scheduler.out.drawer
    if purpose == STEPS:
        assert scheduler.graphs is None
        assert isinstance(draws, DrawGraphs) is (good > 0)
    else:
        assert scheduler.graphs is not None
        assert isinstance(draws, DrawGraphs)
        assert draws.graphs is None


def state(cache: SlotCache) -> list[Any]:
    """Of every layer: what is in use, and what is in it."""
    return [
        (layer.rows, layer.length, layer.low, layer.high, *(part[:, :, : layer.high].clone() for part in layer.storage))
        for layer in cache.slots
    ]


def test_a_step_that_fails_leaves_the_cache_alone() -> None:
    """The first one, one with another result, and a later one: what is in use is the same, to the bit."""
    policy = make_policy()
    with torch.no_grad():
        scheduler = scheduling.Scheduler(policy, [None, None], PROMPTS, 1, 64, output(policy, LONG))
        logits = scheduler._admit(None)
        assert logits is not None
        token, position = logits.argmax(-1), scheduler.position
        logits = scheduler._advance(token)
        before = state(scheduler.cache)
        for good in (0, 1):
            steps = StepGraphs(policy, scheduler.cache, logits, partial(FailingRecorder, Failing(STEPS, good)))
            assert not steps.agrees(token, position, -logits)
            assert steps.graphs.captures == good
            torch.testing.assert_close(state(scheduler.cache), before, rtol=0, atol=0)
        steps.graphs.forget()
        assert steps.next_logits(logits.argmax(-1), position + 1) is None
    torch.testing.assert_close(state(scheduler.cache), before, rtol=0, atol=0)


@pytest.fixture
def uncollected() -> Iterator[None]:
    """Nothing is freed but what nobody refers to."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


class Watch:
    """Refers weakly to what rollouts make."""

    def __init__(self, change: pytest.MonkeyPatch) -> None:
        self.made: list[weakref.ref[Any]] = []
        self.storages: list[StorageWeakRef] = []
        for kind in (SlotCache, StepGraphs, DrawGraphs):
            change.setattr(scheduling, kind.__name__, self.watched(kind))
        change.setattr(in_process, "why_not", lambda policy, windows: None)
        change.setattr(in_process, "CudaRecorder", lambda device, required, purpose: TapeRecorder(purpose))

    def watched(self, kind: Any) -> Callable[..., Any]:
        """Makes one of the kind."""

        def make(*args: Any, **kwargs: Any) -> Any:
            one = kind(*args, **kwargs)
            self.made.append(weakref.ref(one))
            if kind is StepGraphs:
                tensors = [one.logits, *(part for layer in one.cache.slots for part in layer.storage)]
                self.storages += [StorageWeakRef(tensor.untyped_storage()) for tensor in tensors]
            return one

        return make

    def all_gone(self) -> bool:
        """Whether nothing is left, of three kinds of things and at least as many tensors."""
        assert len(self.made) == 3
        assert len(self.storages) > 3
        return all(one() is None for one in self.made) and all(storage.expired() for storage in self.storages)


@pytest.mark.usefixtures("uncollected")
def test_a_rollout_leaves_no_memory_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys, values, logits and graphs are freed as soon as it is over, before anything else asks for memory."""
    watch, policy = Watch(monkeypatch), make_policy()
    generation = InProcessEngine(6, pack_weights=False).generate(policy, TOKENIZER, PROMPTS, UID, LONG, 7)
    assert watch.all_gone()
    same(generation, plainly(policy, LONG))


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize("fails", ["draw", "prefill", "capture"])
def test_nor_does_one_that_fails(fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle, once its exception is forgotten."""
    watch, policy, drawn = Watch(monkeypatch), make_policy(), DrawGraphs.__call__
    calls = []

    def some(self: DrawGraphs, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == 5:
            raise FloatingPointError("enough")
        return drawn(self, *args)

    def never(*args: Any) -> Any:
        raise FloatingPointError("enough")

    if fails == "draw":
        monkeypatch.setattr(DrawGraphs, "__call__", some)
    elif fails == "capture":
        monkeypatch.setattr(DrawGraphs, "_draw", never)
    else:
        first = scheduling.Scheduler._prefill
        monkeypatch.setattr(
            scheduling.Scheduler, "_prefill", lambda *args: never() if len(watch.made) == 3 else first(*args)
        )
    try:
        InProcessEngine(6, pack_weights=False).generate(policy, TOKENIZER, PROMPTS, UID, LONG, 7)
    except FloatingPointError:
        pass
    else:
        pytest.fail("it did not fail")
    assert watch.all_gone()


def test_the_engine_where_cuda_captures_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By default it goes on; graphs that were demanded are refused with what to do about it."""
    policy, cuda = make_policy(), FakeCuda(monkeypatch, RuntimeError("CUDA error: unknown error\nMore about it"))
    monkeypatch.setattr(in_process, "why_not", lambda policy, windows: None)
    same(InProcessEngine(6).generate(policy, TOKENIZER, PROMPTS, UID, LONG, 7), plainly(policy, LONG))
    assert "decoding steps cannot be captured as CUDA graphs (CUDA error: unknown error); this" in caplog.text
    assert cuda.untouched()
    with pytest.raises(RuntimeError, match=r"engine\.graphs: true is not possible: decoding steps .*; leave it null"):
        InProcessEngine(6, graphs=True).generate(policy, TOKENIZER, PROMPTS, UID, LONG, 7)
    assert cuda.untouched()
    assert not policy.training
