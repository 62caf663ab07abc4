"""A real vLLM server on the CPU: it samples from the weights that were trained, phase after phase.

Run by ``make test-vllm``, which gives vLLM an environment of its own.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lit_rlvr_callbacks import TruncatedImportance
from rollouts import ThreadedReduce, run_ranks
from runs import train
from transformers import AutoTokenizer
from vllm_runs import (
    SURROUNDINGS,
    TOLERANCE,
    LongPrompts,
    Watch,
    check_greedy,
    distance,
    make_module,
    save_tiny,
)

from lit_rlvr.engines import Generation, VLLMColocatedEngine, VLLMServerEngine
from lit_rlvr.engines.vllm_broadcast import BroadcastRoad
from lit_rlvr.engines.vllm_colocated import free_port
from lit_rlvr.engines.vllm_launch import ServerProcess
from lit_rlvr.engines.vllm_push import FileRoad
from lit_rlvr.lora import LoRA
from lit_rlvr.policy import load_policy
from lit_rlvr.reduce import LocalReduce
from lit_rlvr.scoring import score

pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]

PYTHON = os.environ.get("LIT_RLVR_VLLM_PYTHON", "")
OPTIONS = ["--dtype=float32", "--enforce-eager", "--max-model-len=256", "--gpu-memory-utilization=0.2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def server(folder: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server that ``lit-rlvr serve`` started."""
    if not PYTHON:
        pytest.skip("needs vLLM: make test-vllm")
    port = free_port()
    command = [sys.executable, "-m", "lit_rlvr", "serve", folder, f"--python={PYTHON}", f"--port={port}", *OPTIONS]
    output = tmp_path_factory.mktemp("server") / "server.log"
    process = ServerProcess(command, {**os.environ, **SURROUNDINGS}, f"http://127.0.0.1:{port}", output)
    try:
        process.wait_until_ready(900)
        yield process.address
    finally:
        process.stop()


def test_the_server_follows_the_adapters(folder: str, server: str) -> None:
    """Merged on their way, in every phase; the server knows nothing of adapters."""
    pytest.importorskip("peft", reason="the extra lit-rlvr[lora] is not installed")
    watch, options = Watch(1.0), {"lora": LoRA(), "optimizer": lambda p: torch.optim.AdamW(p, lr=1e-1)}
    train(make_module(folder, VLLMServerEngine([server]), 1.0, **options), 6, watch, task=LongPrompts())
    print(f"\nadapters: largest |difference of log-probabilities| per phase: {watch.now}")
    start = load_policy(folder)
    moved = [distance(rollout, score(start, rollout, 1.0, 4096)[0]) for rollout in watch.phases]
    print(f"adapters: the same, of the model without them: {moved}")
    assert max(watch.now) < TOLERANCE
    assert min(moved[1:]) > 10 * TOLERANCE


class Spans(Callback):
    """When phases were sampled and when they were learnt from, and the weights that they began with."""

    def __init__(self) -> None:
        self.asked: list[tuple[float, float]] = []
        self.learnt: list[list[float]] = []
        self.stale: list[tuple[float, float]] = []
        self._before: Any = None

    def watch(self, engine: VLLMServerEngine) -> VLLMServerEngine:
        """The engine, which now tells when it samples."""
        generate = engine.generate

        def timed(*arguments: Any) -> Generation:
            began = time.perf_counter()
            out = generate(*arguments)
            self.asked.append((began, time.perf_counter()))
            return out

        engine.generate = timed  # type: ignore[method-assign]
        return engine

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch.minibatch == 0:
            self.learnt.append([pl_module.phase.ready, 0.0])
        self.learnt[-1][1] = time.perf_counter()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Before the phase runs, and so before its first update."""
        if batch.minibatch == 0:
            self._sampled, self._now = self._before, load_policy(pl_module.model)
            self._now.load_state_dict(pl_module.policy.state_dict())
            self._before = self._now

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        rollout = pl_module.phase.rollout
        if len(self.stale) < len(self.asked) and len(self.stale) == int(rollout.uid[0, 0]):
            of = [distance(rollout, score(p or self._now, rollout, 1.0, 4096)[0]) for p in (self._sampled, self._now)]
            self.stale.append((of[0], of[1]))


def test_a_phase_is_sampled_while_the_one_before_learns(folder: str, server: str) -> None:
    """Its log-probabilities are those of the weights before, and ratios to them are what learning is corrected by."""
    spans = Spans()
    module = make_module(folder, spans.watch(VLLMServerEngine([server])), 1.0, overlap=True)
    recorder = train(module, 12, spans, TruncatedImportance(), task=LongPrompts())
    print(f"\noverlap: largest |difference of log-probabilities| from weights before, current ones: {spans.stale}")
    ahead = [f"{a - b:.3f} s" for (_, b), (a, _) in zip(spans.learnt, spans.asked[1:], strict=False)]
    print(f"overlap: from the end of learning a phase to the beginning of sampling the next: {ahead}")
    print(f"overlap: waited {[round(m['time/wait_s'], 3) for m in recorder.metrics[::2]]} s")
    assert len(spans.asked) == len(spans.learnt) == len(spans.stale) == 6
    assert all(asked < end for (_, end), (asked, _) in zip(spans.learnt, spans.asked[1:], strict=False))
    assert max(before for before, _ in spans.stale) < TOLERANCE
    assert min(now for _, now in spans.stale[1:]) > 10 * TOLERANCE
    assert [m["rollout/lag_updates"] for m in recorder.metrics[::2]] == [0, 2, 2, 2, 2, 2]
    assert all(m["rollout/engine_ratio_max"] > 1 + 10 * TOLERANCE for m in recorder.metrics[2::2])


@pytest.mark.parametrize("overlap", [False, True])
def test_it_learns(overlap: bool, folder: str, server: str) -> None:
    """Rewards rise, one step off policy too."""
    module = make_module(folder, VLLMServerEngine([server]), 1.0, overlap=overlap)
    recorder = train(module, 60, *([TruncatedImportance()] if overlap else []), task=LongPrompts())
    rewards = [m["rollout/reward"] for m in recorder.metrics[::2]]
    print(f"\noverlap={overlap}: reward per phase: {[round(r, 2) for r in rewards]}")
    assert rewards[0] < 0.75
    assert min(rewards[-6:]) > 0.9


@pytest.mark.parametrize(("temperature", "transport"), [(1.0, "files"), (0.7, "gloo")])
def test_the_server_follows_the_trained_weights(temperature: float, transport: Any, folder: str, server: str) -> None:
    """Its log-probabilities are those of the training model, in every phase, and no older policy's."""
    watch, engine = Watch(temperature), VLLMServerEngine([server], transport=transport)
    recorder = train(make_module(folder, engine, temperature), 10, watch, task=LongPrompts())
    assert isinstance(watch.road, {"files": FileRoad, "gloo": BroadcastRoad}[transport])
    print(f"\nT={temperature}: largest |difference of log-probabilities| per phase, training model: {watch.now}")
    print(f"T={temperature}: the same, of weights one optimiser step old: {watch.stale}")
    assert len(watch.now) == 5
    assert len(watch.stale) == 4
    assert max(watch.now) < TOLERANCE
    assert min(watch.stale) > 10 * TOLERANCE
    for metrics in recorder.metrics[::2]:
        assert metrics["engine/retries"] == 0
        assert metrics["rollout/engine_ratio_max"] < 1 + 2 * TOLERANCE
        assert metrics["rollout/engine_ratio_min"] > 1 - 2 * TOLERANCE
    pushing = [m["time/sync_s"] for m in recorder.metrics[::2]]
    print(f"T={temperature}, {transport}: seconds of pushing weights per phase: {pushing}")
    lengths = torch.cat([rollout.lengths for rollout in watch.phases])
    truncated = torch.cat([rollout.truncated for rollout in watch.phases])
    assert 0 < int(truncated.sum()) < len(truncated)
    assert bool((lengths[truncated] == 24).all())
    for rollout in watch.phases:
        last = rollout.response_ids.gather(1, rollout.lengths[:, None] - 1).squeeze(1)
        assert torch.equal(last != 1, rollout.truncated)


@pytest.mark.parametrize("stop", [[], ["7", "+2"]])
def test_greedy_responses_are_those_of_the_policy_itself(stop: list[str], folder: str, server: str) -> None:
    """Token for token, with where they end and why, and with the log-probabilities at temperature 1."""
    policy, tokenizer = load_policy(folder), AutoTokenizer.from_pretrained(folder)
    engine = VLLMServerEngine([server])
    engine.setup()
    engine.sync(policy, 0, LocalReduce())
    check_greedy(engine, policy, tokenizer, stop)


def test_a_run_starts_a_server_of_its_own(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And ends it."""
    if not PYTHON:
        pytest.skip("needs vLLM: make test-vllm")
    for name, value in SURROUNDINGS.items():
        monkeypatch.setenv(name, value)
    processes: list[ServerProcess] = []

    class Look(Watch):
        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if pl_module.engine.process is not None:
                processes.append(pl_module.engine.process)

    watch = Look(1.0)
    train(make_module(folder, VLLMColocatedEngine(PYTHON, OPTIONS), 1.0), 4, watch, task=LongPrompts())
    print(f"\nown server: largest |difference of log-probabilities| per phase: {watch.now}")
    assert len(watch.now) == 2
    assert max(watch.now) < TOLERANCE
    assert processes[0].process.poll() is not None


def test_ranks_share_a_server_that_spreads_the_model(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of its two processes takes its part of the weights that are pushed; both ranks sample from them."""
    if not PYTHON:
        pytest.skip("needs vLLM: make test-vllm")
    for name, value in SURROUNDINGS.items():
        monkeypatch.setenv(name, value)
    policies, tokenizer = [load_policy(folder) for _ in range(2)], AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        for policy in policies:
            for parameter in policy.parameters():
                parameter *= 1.1

    def rank(reduce: ThreadedReduce) -> list[int]:
        engine = VLLMColocatedEngine(PYTHON, OPTIONS, devices_per_server=2)
        engine.setup()
        engine.sync(policies[reduce.rank], 0, reduce)
        check_greedy(engine, policies[reduce.rank], tokenizer, [])
        workers = [served.workers for served in engine.served]
        engine.close()
        return workers

    assert run_ranks(2, rank, timeout=900) == [[2], [2]]
