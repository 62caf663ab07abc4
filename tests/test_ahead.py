"""One step off policy: what is sampled while the policy learns, with which weights, and how it ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from fake_vllm import END, FakeVLLM, serving
from lightning.pytorch.callbacks import Callback
from lit_rlvr_callbacks import StageDetector, TruncatedImportance
from runs import TINY, EvenTask, Recorder, tiny_trainer
from torch import Tensor

from lit_rlvr import Batch, RLVRDataModule, RLVRModule, Sampling
from lit_rlvr.checkpoint import PhaseCheckpoint
from lit_rlvr.engines import VLLMColocatedEngine, VLLMServerEngine
from lit_rlvr.models import resolve_model
from lit_rlvr.policy import load_policy
from lit_rlvr.scoring import score
from lit_rlvr.shaping import DynamicSampling
from lit_rlvr.types import RolloutBatch

PROMPTS, UPDATES, PATIENCE = 4, 2, 30.0
"""Prompts and optimiser steps of a phase; seconds after which something that waits has waited in vain."""


class Follows(FakeVLLM):
    """Samples nonsense, says what its weights make of it, and remembers who asked what of which weights."""

    def __init__(self) -> None:
        super().__init__(22, 64)
        self.policy = load_policy(resolve_model(TINY))
        self.used: list[tuple[str, tuple[int, ...], int]] = []
        self.working = 0
        self.disturbed = False
        self.choices = self.respond

    def hold(self, number: int) -> None:
        """Called when request ``number`` (from 0) has come, before it is answered."""

    def respond(self, fake: FakeVLLM, body: dict[str, Any]) -> list[dict[str, Any]]:
        sampling = body["sampling_params"]
        with self.lock:
            number, self.working = len(self.used), self.working + 1
            self.used.append((self.name, tuple(body["token_ids"]), sampling["seed"]))
        self.hold(number)
        if self.aborted.is_set():
            choices = [self.choice(i, [3, END], "abort") for i in range(sampling["n"])]
        else:
            rows = [[3 + i, END] if i % 2 else [3 + i, 4, END] for i in range(sampling["n"])]
            choices = [self.scored(self.choice(i, row), body["token_ids"]) for i, row in enumerate(rows)]
        with self.lock:
            self.working -= 1
        return choices

    def scored(self, choice: dict[str, Any], prompt: list[int]) -> dict[str, Any]:
        """The same response with the weights' own log-probabilities."""
        with self.lock, torch.no_grad():
            self.policy.hf.load_state_dict(self.weights, strict=False)
            row = torch.tensor([prompt + choice["token_ids"]])
            index = torch.arange(len(prompt) - 1, row.shape[1] - 1)
            logprobs, _ = self.policy(row, index, torch.tensor(choice["token_ids"]))
        for said, logprob in zip(choice["logprobs"]["content"], logprobs.tolist(), strict=True):
            said["logprob"] = logprob
        return choice

    def lit_rlvr_begin(self) -> dict[str, Any]:
        self.disturbed |= self.working > 0
        return super().lit_rlvr_begin()


class Watch(Callback):
    """Keeps each phase's rollout and credit and the weights that it began with, and says which phases have ended."""

    def __init__(self) -> None:
        self.rollouts: list[RolloutBatch] = []
        self.weights: list[Tensor] = []
        self.starts: list[dict[str, Tensor]] = []
        self.ended = [threading.Event() for _ in range(8)]

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch.minibatch == 0:
            self.starts.append({name: tensor.clone() for name, tensor in pl_module.policy.state_dict().items()})

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch.minibatch == UPDATES - 1:
            self.rollouts.append(pl_module.phase.rollout)
            self.weights.append(pl_module.phase.credit.weight)
            self.ended[batch.phase].set()


@contextmanager
def follows() -> Iterator[tuple[Follows, str]]:
    fake = Follows()
    with serving(fake) as address:
        yield fake, address


def make(address: str, overlap: bool = True, **options: Any) -> RLVRModule:
    defaults: dict[str, Any] = {
        "batch": Batch(PROMPTS, 4, PROMPTS // UPDATES), "sampling": Sampling(max_new_tokens=12), "overlap": overlap,
        "engine": VLLMServerEngine([address]), "optimizer": lambda p: torch.optim.SGD(p, lr=1.0),
    }  # fmt: skip
    return RLVRModule(TINY, **{**defaults, **options})


def fit(module: RLVRModule, phases: int, *callbacks: Callback, resume: Path | None = None) -> Recorder:
    recorder = Recorder()
    trainer = tiny_trainer(phases * UPDATES, [*callbacks, recorder, TruncatedImportance()])
    trainer.fit(module, datamodule=RLVRDataModule(EvenTask(), eval_prompts=4), ckpt_path=resume, weights_only=True)
    return recorder


def test_a_phase_is_sampled_while_the_one_before_learns() -> None:
    """Servers answer for a phase only once the phase before has ended, which would never be if it had to wait."""
    watch, in_vain = Watch(), []
    with follows() as (fake, address):

        def hold(number: int) -> None:
            if number >= PROMPTS and not watch.ended[number // PROMPTS - 1].wait(PATIENCE):
                in_vain.append(number)

        fake.hold = hold  # type: ignore[method-assign]
        recorder = fit(make(address), 4, watch)
        pushed = list(dict.fromkeys(body["new_version"] for body in fake.bodies("/update_weight_version")))
    assert in_vain == []
    assert not fake.disturbed
    phases = [fake.used[i : i + PROMPTS] for i in range(0, len(fake.used), PROMPTS)]
    assert [pushed.index(name) for phase in phases for name in {name for name, _, _ in phase}] == [0, 0, 1, 2]
    assert [m["rollout/lag_updates"] for m in recorder.metrics[::UPDATES]] == [0, UPDATES, UPDATES, UPDATES]
    assert all(m["time/wait_s"] >= 0 for m in recorder.metrics[::UPDATES])
    assert not any(thread.name.startswith("lit-rlvr-ahead") for thread in threading.enumerate())


def test_ratios_are_to_the_weights_that_sampled() -> None:
    """The server's log-probabilities are those of the phase before, the old ones are this phase's, and TIS weighs."""
    watch = Watch()
    with follows() as (_, address):
        recorder = fit(make(address), 3, watch)
    policy = load_policy(resolve_model(TINY))
    for phase, rollout in enumerate(watch.rollouts):
        assert rollout.engine_logprobs is not None
        for start, logprobs in ((phase, rollout.old_logprobs), (max(phase - 1, 0), rollout.engine_logprobs)):
            policy.load_state_dict(watch.starts[start])
            wanted, _ = score(policy, rollout, 1.0, 4096)
            torch.testing.assert_close(logprobs, wanted)
        mask = rollout.response_mask
        ratio = (rollout.old_logprobs - rollout.engine_logprobs).exp()
        torch.testing.assert_close(watch.weights[phase][mask], ratio.clamp(max=2.0)[mask])
        moved = float((ratio - 1)[mask].abs().max())
        assert moved > 1e-3 if phase else moved < 1e-5
    assert recorder.metrics[UPDATES]["rollout/engine_ratio_max"] > 1 + 1e-3


def test_the_same_is_asked_as_without() -> None:
    """Prompts and seeds; and nothing is asked that no phase learns from."""
    asked = []
    for overlap in (False, True):
        with follows() as (fake, address):
            fit(make(address, overlap), 3)
        asked.append([sorted(used[1:] for used in fake.used[i : i + PROMPTS]) for i in range(0, 12, PROMPTS)])
        assert len(fake.used) == 3 * PROMPTS
    assert asked[0] == asked[1]


@pytest.mark.slow
def test_a_resumed_run_draws_the_same_prompts(tmp_path: Path) -> None:
    """What was sampled ahead is not in the checkpoint: its phase is sampled again, with current weights."""
    asked = []
    for resume in (None, tmp_path / "last.ckpt"):
        with follows() as (fake, address):
            checkpoints = PhaseCheckpoint(every=2, folder=str(tmp_path), at_end=False)
            recorder = fit(make(address), 4 if resume else 3, checkpoints, resume=resume)
        asked.append(sorted(used[1:] for used in fake.used))
    with follows() as (fake, address):
        fit(make(address), 4)
    whole = [used[1:] for used in fake.used]
    assert asked == [sorted(whole[: 3 * PROMPTS]), sorted(whole[2 * PROMPTS :])]
    assert [m["rollout/lag_updates"] for m in recorder.metrics[::UPDATES]] == [0, UPDATES]


def test_rounds_that_are_added_have_current_weights() -> None:
    """Every group is half right, or in the first round of every phase all wrong."""
    with follows() as (fake, address):

        def respond(fake_: FakeVLLM, body: dict[str, Any]) -> list[dict[str, Any]]:
            number = len(fake.used) // PROMPTS
            choices = fake.respond(fake_, body)
            if number % 2 == 0:
                return [fake.scored(fake.choice(c["index"], [3, END]), body["token_ids"]) for c in choices]
            return choices

        fake.choices = respond
        module = make(address, dynamic_sampling=DynamicSampling(2), batch=Batch(PROMPTS, 4, PROMPTS // UPDATES))
        module.engine.requests = 1  # type: ignore[attr-defined]  # in order, which the fake counts on
        recorder = fit(module, 2)
        pushed = [body["new_version"] for body in fake.bodies("/update_weight_version")]
    assert [pushed.index(name) for name, _, _ in fake.used[::PROMPTS]] == [0, 0, 0, 1]
    assert [m["rollout/lag_updates"] for m in recorder.metrics[::UPDATES]] == [0, UPDATES / 2]
    assert len({prompt for _, prompt, _ in fake.used}) == 4 * PROMPTS


def test_evaluations_wait() -> None:
    """They have weights pushed, which no request may see."""

    class Evaluate(Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
            pl_module.evaluator.run(pl_module)

    with follows() as (fake, address):
        recorder = fit(make(address), 3, Evaluate())
        assert fake.called("/update_weight_version") > 3
    assert not fake.disturbed
    assert [m["rollout/lag_updates"] for m in recorder.metrics[::UPDATES]] == [0, UPDATES, UPDATES]


def test_a_failure_is_raised_when_its_phase_begins() -> None:
    """With the server's words, after the phase before has been learnt from."""
    watch = Watch()
    with follows() as (fake, address):

        def respond(fake_: FakeVLLM, body: dict[str, Any]) -> list[dict[str, Any]]:
            return fake.respond(fake_, body) if len(fake.used) < PROMPTS else []

        fake.choices = respond
        with pytest.raises(RuntimeError, match="gave 0 responses instead of 4"):
            fit(make(address), 3, watch)
    assert len(watch.rollouts) == 1


class Stop(Callback):
    """Ends a run after its first phase, once the next is being asked for."""

    def __init__(self, how: str, asked: threading.Event) -> None:
        self.how, self.asked = how, asked

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        assert self.asked.wait(PATIENCE)
        if self.how == "should_stop":
            trainer.should_stop = True
        else:
            raise ArithmeticError("stop")


@pytest.mark.parametrize("how", ["should_stop", "raise"])
def test_a_run_that_stops_gives_up_what_it_asked_for(how: str) -> None:
    """Servers break off responses that nobody wants, and the thread ends."""
    asked, in_vain = threading.Event(), []
    with follows() as (fake, address):

        def hold(number: int) -> None:
            if number >= PROMPTS:
                asked.set()
                if not fake.aborted.wait(PATIENCE):
                    in_vain.append(number)

        fake.hold = hold  # type: ignore[method-assign]
        module = make(address)
        module.engine.requests = 2  # type: ignore[attr-defined]  # the other two are not asked for any more
        if how == "raise":
            with pytest.raises(ArithmeticError):
                fit(module, 3, Stop(how, asked))
        else:
            fit(module, 3, Stop(how, asked))
        ended = time.monotonic() + PATIENCE
        while fake.working and time.monotonic() < ended:  # nobody waits for the servers' last words
            time.sleep(0.01)
        assert fake.working == 0
    assert in_vain == []
    assert PROMPTS < len(fake.used) < 2 * PROMPTS + 1
    assert not any(thread.name.startswith("lit-rlvr-ahead") for thread in threading.enumerate())


def test_what_cannot_overlap_is_refused() -> None:
    refused: list[tuple[str, dict[str, Any]]] = [
        ("InProcessEngine samples with the policy that is learning", {}),
        ("VLLMColocatedEngine share them with training", {"engine": VLLMColocatedEngine("py")}),
        ("engine.sleep_level 1", {"engine": VLLMServerEngine(["http://localhost:1"], sleep_level=1)}),
    ]
    for said, options in refused:
        with pytest.raises(ValueError, match=rf"model\.overlap .*{said}"):
            RLVRModule(TINY, overlap=True, **options)


@pytest.mark.parametrize(
    "chain", [[], [StageDetector(), TruncatedImportance(stages=["plateau"])]], ids=["without", "at times"]
)
def test_old_responses_need_their_correction(chain: list[Callback]) -> None:
    with follows() as (_, address), pytest.raises(ValueError, match="which the callback TruncatedImportance corrects"):
        tiny_trainer(2, chain).fit(make(address), datamodule=RLVRDataModule(EvenTask()))
