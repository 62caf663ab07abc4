"""The run's arithmetic, and the memory estimate against what torch really allocates."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from command_line import untouched_process
from transformers import Qwen3Config

from lit_rlvr.__main__ import main
from lit_rlvr.architectures import known_config
from lit_rlvr.credit import CreditCallback
from lit_rlvr.explain import scope_words
from lit_rlvr.explain_memory import readable
from lit_rlvr.facts import Cluster
from lit_rlvr.memory import Numbers, estimate
from lit_rlvr.settings import Batch

HERE = Path(__file__).parent
CONFIGS = HERE.parent / "configs"
LONG = "--model.evaluations.greedy.max_new_tokens=40"


def explained(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """What ``explain`` prints about the quickstart with options."""
    assert main(["explain", "--config", str(CONFIGS / "quickstart.yaml"), *options]) == 0
    return capsys.readouterr().out


def test_the_arithmetic_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    out = explained(capsys, "--model.batch.epochs=2", "--trainer.max_steps=42")
    assert "32 prompts x 8 responses = 256 rollouts of at most 34 tokens per phase" in out
    assert "2 pass(es) x 2 mini-batch(es) = 4 optimiser step(s) per phase" in out
    assert "16 prompts x 8 responses = 128 rollouts" in out
    assert "max_steps 42 = 11 phases, 2,816 rollouts" in out
    assert "max_steps is no multiple of 4: the last phase's rollouts are not all used" in out
    assert "20000 training problems, longest prompt 8 tokens: 625 phases" in out
    assert "credit: StageDetector → EntropyTopK" in out


def test_a_run_without_a_number_of_steps(capsys: pytest.CaptureFixture[str]) -> None:
    """Lightning's default is far away; an endless run is called so."""
    assert "max_steps is not set: the run ends after 1,000 passes" in explained(capsys, "--trainer.max_steps=-1")
    endless = explained(capsys, "--trainer.max_steps=-1", "--trainer.max_epochs=-1")
    assert "max_steps is not set: the run ends when it is stopped\n" in endless


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even an empty MLflow database."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with untouched_process():
        assert main(["explain", "--config", str(CONFIGS / "quickstart.yaml")]) == 0
    assert list(tmp_path.iterdir()) == []


def test_a_run_for_other_machines_is_explained_here(capsys: pytest.CaptureFixture[str]) -> None:
    """GPUs, many nodes and a sharded strategy need not be at hand."""
    strategy = "--trainer.strategy={class_path: ModelParallelStrategy}"
    places = "--trainer.accelerator=cuda", "--trainer.devices=8", "--trainer.num_nodes=2"
    out = explained(capsys, *places, strategy, LONG, "--model.engine=VLLMInProcessEngine")
    assert "each has a vLLM too, whose memory is not counted below" in out
    assert "sampled: 1 response(s) of at most 34 tokens to 512 problems, temperature 1\n" in out
    assert "greedy: 1 response(s) of at most 40 tokens to 512 problems, temperature 0\n" in out
    assert "16 device(s), weights and optimizer state spread over them" in out
    assert "each learns from 8 rollouts per step" in out


def test_every_option_that_is_on_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    out = explained(capsys, "--config", str(CONFIGS / "algorithm/grpo.yaml"))
    assert "kl: KLPenalty(beta=0.04, estimator='k3', where='loss')" in out
    assert "aggregation: SequenceMean()" in out
    assert "dynamic_sampling" not in out
    assert re.search(r"^ reference model +295\.0 KiB $", out, re.MULTILINE)


def test_a_critic_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    """Its passes, and the memory of a second model beside the first."""
    out = explained(capsys, "--model.advantage=GAE", "--model.critic.lr=1e-5", "--model.batch.epochs=3")
    assert "critic: Critic(model=None, lr=1e-05, clip=0.2)" in out
    assert "critic: +1 pass for values, and +1 forward and backward pass in each of 3 epoch(s)" in out
    assert re.search(r"^ critic +885\.0 KiB ", out, re.MULTILINE)
    assert " critic's gradients and activations " in out
    assert "reference model" not in out


def test_whole_gradients_are_explained(capsys: pytest.CaptureFixture[str]) -> None:
    """75,520 weights of 4 bytes on every device, and a critic's, if there are micro-batches to wait for."""
    sharded = ("--config", str(CONFIGS / "strategy/fsdp.yaml"))
    small, last = "--model.batch.micro_tokens=200", "--trainer.strategy.sync=last"
    each = explained(capsys, *sharded, small)
    assert "gradients are averaged over the devices and spread after each of them" in each
    assert "whole gradients" not in each
    out = explained(capsys, *sharded, small, last, "--model.advantage=GAE", "--model.critic.lr=1e-5")
    assert "averaged after the last of them, and whole on each device until then (sync: last)" in out
    assert "whole gradients, between micro-batches 590.0 KiB" in " ".join(out.split())
    assert "whole gradients" not in explained(capsys, *sharded, last)
    one = "--trainer.devices=1"
    assert main(["explain", "--config", str(CONFIGS / "quickstart.yaml"), *sharded, last, one]) == 2
    assert "sync: last spares a single device nothing" in capsys.readouterr().err


def test_what_the_run_will_find_is_not_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert "devices auto is what the run finds; here it counts as 1" in explained(capsys, "--trainer.devices=auto")


def test_callbacks_are_told_apart_by_their_options(capsys: pytest.CaptureFixture[str]) -> None:
    """Two arms of an ablation do not look alike."""
    out = explained(capsys)
    assert "EntropyTopK(rho=0.2, select='top', normalize='selected', preset='invariant'" in out


def test_what_a_phase_costs_beside_learning(capsys: pytest.CaptureFixture[str]) -> None:
    """Rounds of sampling, the scheduler's end in phases, and passes for old and reference log-probabilities."""
    out = explained(capsys, "--model.dynamic_sampling.max_rounds=5", "--model.kl.beta=0.1", "--model.dtype=bfloat16")
    assert "replaced in up to 5 round(s): 1x the rollouts where none is, 2x where every other one is, 5x = 1,280" in out
    assert "LinearLR counts optimiser steps: 2 per phase; it ends after 5 steps = 2.5 phases" in out
    assert "old log-probabilities: +1 scoring pass" in out
    assert "reference: +1 scoring pass" in out
    assert "model's context" not in out
    longer = explained(capsys, "--model.sampling.max_new_tokens=200")
    assert "prompt and response may take 208 tokens: the model's context is 128" in longer


def test_scopes_and_their_cost_are_said() -> None:
    class Penalising(CreditCallback):
        def penalty(self, tokens: Any, ctx: Any) -> None:
            return None

        def shape_rewards(self, rollout: Any, rewards: Any, ctx: Any) -> Any:
            return rewards

    module = SimpleNamespace(batch=Batch(prompts=8, minibatch_prompts=2, micro_rows=3))
    callback = CreditCallback()
    assert scope_words(module, callback) == ["phase"]
    callback.scope, callback.reads_current = "mini_batch", True
    assert scope_words(module, callback) == [
        "mini_batch", "reads the current policy: +1 scoring pass in 3 of 4 steps"
    ]  # fmt: skip
    callback.scope = "micro_batch"
    assert scope_words(module, callback) == [
        "micro_batch of 3 responses", "reads the current policy: no pass of its own"
    ]  # fmt: skip
    words = scope_words(module, Penalising())
    assert words == ["phase", "adds to the loss of every response token", "shapes rewards"]


def test_conflicts_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """As they would be before training."""
    config = ("explain", "--config", str(CONFIGS / "quickstart.yaml"))
    assert main([*config, "--model.batch.micro_rows=2"]) == 2
    assert "batch.micro_rows is for callbacks that decide per micro-batch" in capsys.readouterr().err
    assert main([*config, "--model.loss=GSPO"]) == 2
    assert "GSPO has one ratio and one gradient per response, so EntropyTopK cannot" in capsys.readouterr().err


def test_the_cluster_is_read_from_the_trainer_section() -> None:
    assert Cluster.of({"devices": "auto"}) == Cluster(1, False)
    assert Cluster.of({"devices": [0, 3], "num_nodes": 4, "strategy": "ddp"}) == Cluster(8, False)
    assert Cluster.of({"devices": "8", "strategy": "fsdp"}) == Cluster(8, True)


def test_parts_of_the_estimate() -> None:
    """Weights, gradients, AdamW's two states and the cache, by hand."""
    config = Qwen3Config(
        vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, tie_word_embeddings=False,
    )  # fmt: skip
    memory = estimate(config, Numbers("bfloat16"), micro_rows=1, width=10, rollout_rows=3, reference=True)
    layer = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64 + 2 * 8 + 2 * 32
    parameters = 2 * 100 * 32 + 2 * layer + 32
    assert (memory.weights, memory.reference, memory.gradients) == (2 * parameters,) * 3
    assert memory.optimizer == 4 * parameters
    keys_and_values = 3 * 10 * 2 * 2 * 2 * 8 * 2
    assert memory.cache - keys_and_values == 3 * 100 * 4 * 4
    assert memory.rollout == memory.weights + memory.reference + memory.optimizer + memory.cache
    sharded = estimate(config, Numbers("bfloat16", share=0.5), micro_rows=1, width=10, rollout_rows=3)
    assert sharded.weights == parameters
    assert (memory.gathered, sharded.gathered) == (0, 2 * parameters)
    assert sharded.rollout == sharded.weights + sharded.optimizer + sharded.cache + sharded.gathered
    assert sharded.training == sharded.weights + sharded.gradients + sharded.optimizer + (
        sharded.activations + sharded.head + sharded.gathered_parts
    )
    assert sharded.gathered_parts == 2 * (2 * 100 * 32 + 32) + 2 * layer * (2 + 4)
    offloaded = estimate(config, Numbers("bfloat16", share=0.5, offload=True), micro_rows=1, width=10, rollout_rows=3)
    assert offloaded.host == sharded.weights + sharded.gradients + sharded.optimizer
    assert offloaded.training == sharded.training - offloaded.host
    assert offloaded.rollout == sharded.rollout - sharded.weights - sharded.optimizer


def test_narrow_weights_narrow_what_is_computed() -> None:
    """Sharded float32 weights that are computed with in bfloat16: activations and cache are those of bfloat16 ones."""
    config, sizes = known_config("Qwen/Qwen3-0.6B"), {"micro_rows": 1, "width": 16, "rollout_rows": 3}
    narrow = estimate(config, Numbers("bfloat16", share=0.5), **sizes)
    memory = estimate(config, Numbers("float32", "bfloat16", "bfloat16", share=0.5), **sizes)
    assert memory.weights == 2 * narrow.weights
    for part in ("activations", "head", "cache", "gathered", "gathered_parts"):
        assert getattr(memory, part) == getattr(narrow, part)
    token = 2 * 28 * 8 * 128 * 2
    refilled = estimate(config, Numbers("bfloat16"), **sizes, refilled=True)
    assert refilled.cache - narrow.cache == 3 * token * (80 - 16)  # 64 to spare
    first = estimate(config, Numbers("float32", "bfloat16", share=0.5), **sizes)  # PyTorch's first FSDP
    assert first.gathered == 2 * memory.gathered
    assert first.activations == memory.activations


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("size", "mode"),
    [
        ("small", "plain"),
        ("small", "checkpointing"),
        ("medium", "plain"),
        ("medium", "checkpointing"),
        ("medium", "bfloat16"),
        ("medium", "autocast"),
        ("medium", "sharded"),
    ],
)
def test_the_estimate_is_within_a_quarter_of_the_measured_peak(size: str, mode: str) -> None:
    command = [sys.executable, str(HERE / "memory_probe.py"), size, mode]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True, env=environment)
    estimated, peak = map(int, done.stdout.split())
    assert 0.75 <= estimated / peak <= 1.25


def test_readable_sizes() -> None:
    assert [readable(n) for n in (0, 1023, 1024, 5 * 2**30)] == ["0.0 B", "1023.0 B", "1.0 KiB", "5.0 GiB"]
