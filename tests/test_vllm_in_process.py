"""A real vLLM in the process that trains, on the CPU: it samples from the weights that were trained.

Run by ``make test-vllm``, in an environment that has both.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from runs import train
from test_ddp import torchrun
from transformers import AutoTokenizer
from vllm_runs import (
    SURROUNDINGS,
    TOLERANCE,
    LongPrompts,
    Watch,
    check_greedy,
    distance,
    make_module,
    rows,
    save_tiny,
)

from lit_rlvr import Sampling
from lit_rlvr.engines import VLLMInProcessEngine
from lit_rlvr.engines.vllm_local import LocalVLLM
from lit_rlvr.lora import LoRA
from lit_rlvr.policy import load_policy
from lit_rlvr.reduce import LocalReduce
from lit_rlvr.scoring import score

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(900),
    pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM in this environment: make test-vllm"),
]

OPTIONS: dict[str, Any] = {
    "dtype": "float32", "enforce_eager": True, "max_model_len": 256, "gpu_memory_utilization": 0.2,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def around() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SURROUNDINGS.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_it_follows_the_trained_weights(temperature: float, folder: str) -> None:
    """Its log-probabilities are those of the training model, in every phase, and no older policy's."""
    watch = Watch(temperature)
    recorder = train(make_module(folder, VLLMInProcessEngine(OPTIONS), temperature), 10, watch, task=LongPrompts())
    print(f"\nin process, T={temperature}: largest |difference of log-probabilities| per phase: {watch.now}")
    print(f"in process, T={temperature}: the same, of weights one optimiser step old: {watch.stale}")
    print(f"seconds of copying weights per phase: {[m['time/sync_s'] for m in recorder.metrics[::2]]}")
    assert len(watch.now) == 5
    assert max(watch.now) < TOLERANCE
    assert min(watch.stale) > 10 * TOLERANCE
    for metrics in recorder.metrics[::2]:
        assert metrics["rollout/engine_ratio_max"] < 1 + 2 * TOLERANCE
        assert metrics["rollout/engine_ratio_min"] > 1 - 2 * TOLERANCE
    truncated = torch.cat([rollout.truncated for rollout in watch.phases])
    assert 0 < int(truncated.sum()) < len(truncated)
    assert not dist.is_initialized()


def test_without_new_weights_they_would_differ(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first phase's are loaded, and no more: the comparison sees it."""
    load, loads = LocalVLLM.load, list[int]()

    def once(self: LocalVLLM, weights: Any) -> None:
        loads.append(1)
        if len(loads) == 1:
            load(self, weights)

    monkeypatch.setattr(LocalVLLM, "load", once)
    watch = Watch(1.0)
    train(make_module(folder, VLLMInProcessEngine(OPTIONS), 1.0), 6, watch, task=LongPrompts())
    print(f"\nin process, weights of the first phase: {watch.now}")
    assert len(loads) == 3
    assert watch.now[0] < TOLERANCE
    assert min(watch.now[1:]) > 10 * TOLERANCE


def test_it_follows_the_adapters(folder: str) -> None:
    """Added to their weights on the way."""
    pytest.importorskip("peft", reason="the extra lit-rlvr[lora] is not installed")
    watch, options = Watch(1.0), {"lora": LoRA(), "optimizer": lambda p: torch.optim.AdamW(p, lr=1e-1)}
    train(make_module(folder, VLLMInProcessEngine(OPTIONS), 1.0, **options), 6, watch, task=LongPrompts())
    start = load_policy(folder)
    moved = [distance(rollout, score(start, rollout, 1.0, 4096)[0]) for rollout in watch.phases]
    print(f"\nin process, adapters: {watch.now}; the model without them: {moved}")
    assert max(watch.now) < TOLERANCE
    assert min(moved[1:]) > 10 * TOLERANCE


def test_it_learns(folder: str) -> None:
    recorder = train(make_module(folder, VLLMInProcessEngine(OPTIONS), 1.0), 60, task=LongPrompts())
    rewards = [m["rollout/reward"] for m in recorder.metrics[::2]]
    print(f"\nin process: reward per phase: {[round(r, 2) for r in rewards]}")
    assert rewards[0] < 0.75
    assert min(rewards[-6:]) > 0.9


def test_training_does_not_notice(folder: str) -> None:
    """Random numbers, threads, environment and process groups are as they were, and a second one can start."""
    torch.manual_seed(1)
    random.seed(1)
    before = torch.get_rng_state(), random.getstate(), torch.set_num_threads, os.environ.get("LD_PRELOAD")
    engine, policy = VLLMInProcessEngine(OPTIONS), load_policy(folder)
    for version in (0, 1):
        engine.setup()
        engine.sync(policy, version, LocalReduce())
        assert torch.equal(torch.get_rng_state(), before[0])
        assert (random.getstate(), torch.set_num_threads, os.environ.get("LD_PRELOAD")) == before[1:]
        assert not {"RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"} & set(os.environ)
        engine.close()
        assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"options": {**OPTIONS, "max_modellen": 9}}, "max_modellen, which vLLM does not know; did you mean max_model"),
        ({"options": OPTIONS, "sleep_level": 1}, r"cannot sleep on this platform \(cpu\); set engine.sleep_level to 0"),
    ],
)
def test_what_vllm_cannot_do_is_refused(changed: dict[str, Any], said: str, folder: str) -> None:
    engine = VLLMInProcessEngine(**changed)
    engine.setup()
    with pytest.raises(ValueError, match=said):
        engine.sync(load_policy(folder), 0, LocalReduce())
    assert not dist.is_initialized()


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_have_one_each(strategy: str, folder: str, tmp_path: Path) -> None:
    """Both with the weights that were trained, gathered where they are sharded; training's group outlives them."""
    torchrun("vllm_in_process_run.py", strategy, folder, str(tmp_path), timeout=600)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    print(f"\n{strategy}: largest |difference of log-probabilities| per phase and rank: {[r['now'] for r in ranks]}")
    for rank in ranks:
        assert len(rank["now"]) == 3
        assert max(rank["now"]) < TOLERANCE
        assert min(rank["moved"][1:]) > 10 * TOLERANCE
        assert rank["sum"] == 3


@pytest.fixture(scope="module")
def ready(folder: str) -> Iterator[VLLMInProcessEngine]:
    """An engine with the folder's weights, for the tests below; above there is one at a time."""
    engine = VLLMInProcessEngine(OPTIONS)
    engine.setup()
    engine.sync(load_policy(folder), 0, LocalReduce())
    yield engine
    engine.close()


@pytest.mark.parametrize("stop", [[], ["7", "+2"]])
def test_greedy_responses_are_those_of_the_policy_itself(
    stop: list[str], folder: str, ready: VLLMInProcessEngine
) -> None:
    """Token for token, with where they end and why, and with the log-probabilities at temperature 1."""
    policy, tokenizer = load_policy(folder), AutoTokenizer.from_pretrained(folder)
    check_greedy(ready, policy, tokenizer, stop)


def test_a_response_depends_on_its_own_numbers(folder: str, ready: VLLMInProcessEngine) -> None:
    """Not on what it is sampled with; another seed, phase, draw or sample gives another."""
    policy, tokenizer, sampling = load_policy(folder), AutoTokenizer.from_pretrained(folder), Sampling(1.0, 20)

    def sample(prompts: list[list[int]], uid: list[tuple[int, int, int]], seed: int = 3) -> list[list[int]]:
        return rows(ready.generate(policy, tokenizer, prompts, torch.tensor(uid), sampling, seed))

    one, two = [3, 4, 5, 6], [7, 8, 9]
    together = sample([one, two], [(1, p, s) for p in range(2) for s in range(3)])
    assert sample([two], [(1, 1, s) for s in range(3)]) == together[3:]
    assert sample([one], [(1, 0, s) for s in range(1, 3)]) == together[1:3]
    others = [sample([one], [uid]) for uid in ((1, 0, 0), (2, 0, 0), (1, 5, 0), (1, 0, 9))]
    others.append(sample([one], [(1, 0, 0)], seed=4))
    assert len({tuple(other[0]) for other in others}) == 5
