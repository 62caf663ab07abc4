"""Runs with a real vLLM on the CPU that several tests share: a tiny model, a task, and a watch on log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from runs import EvenTask
from transformers import Qwen3Config, Qwen3ForCausalLM

from lit_rlvr import Batch, RLVRModule, Sampling
from lit_rlvr.engines import Engine, Generation, InProcessEngine
from lit_rlvr.models import character_tokenizer, save_model
from lit_rlvr.policy import Policy, load_policy
from lit_rlvr.scoring import score
from lit_rlvr.tasks import Prompt, Split
from lit_rlvr.tasks.last_digit import ALPHABET
from lit_rlvr.types import RolloutBatch

SURROUNDINGS = {
    "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}  # fmt: skip
BLOCK = 128
"""Tokens that vLLM's cache keeps together on a CPU; only whole blocks are shared and remembered."""

TOLERANCE = 1e-4
"""Both sides compute in float32, in another order. Differences were below 1e-5; weights that are one phase old differ
by more than ten times the tolerance, which the tests check too."""


@dataclass(frozen=True)
class LongPrompts(EvenTask):
    """Few problems, which every phase sees again, each longer than a block of vLLM's cache."""

    isolated = False

    def prompts(self, split: Split) -> Sequence[Prompt]:
        return [Prompt(i, f"{i}+" * (BLOCK // 2 + 3) + "1?", "even") for i in range(4)]


class Watch(Callback):
    """Keeps every phase's rollout, and how far the policy before it is from the server."""

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature
        self.phases: list[RolloutBatch] = []
        self.now: list[float] = []
        self.stale: list[float] = []
        self.road: Any = None
        self._before: Any = None

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch.minibatch:
            return
        rollout, self.road = pl_module.phase.rollout, getattr(pl_module.engine, "_road", None)
        self.phases.append(rollout)
        self.now.append(distance(rollout, rollout.old_logprobs))
        if self._before is not None:
            self.stale.append(distance(rollout, score(self._before, rollout, self.temperature, 4096)[0]))

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch.minibatch == 1:  # the weights at a phase's second step are older than the next phase's by one step
            self._before = load_policy(pl_module.model, lora=pl_module.lora)
            self._before.load_state_dict(pl_module.policy.state_dict())


def distance(rollout: RolloutBatch, logprobs: torch.Tensor) -> float:
    """Largest difference from the server's log-probabilities."""
    assert rollout.engine_logprobs is not None
    return float((logprobs - rollout.engine_logprobs)[rollout.response_mask].abs().max())


def save_tiny(path: Path) -> str:
    """A tiny Qwen3 whose heads are as wide as vLLM's attention on a CPU needs them."""
    config = Qwen3Config(
        vocab_size=len(ALPHABET) + 3, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32, tie_word_embeddings=True, initializer_range=0.2,
        max_position_embeddings=256, pad_token_id=0, eos_token_id=1, bos_token_id=None, dtype="float32",
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_model(Qwen3ForCausalLM(config), character_tokenizer(ALPHABET), path)
    return str(path)


def make_module(folder: str, engine: Engine, temperature: float, **options: Any) -> RLVRModule:
    """A policy that moves far in a step."""
    return RLVRModule(
        folder, batch=Batch(prompts=4, responses=4, minibatch_prompts=2), engine=engine,
        sampling=Sampling(temperature, max_new_tokens=24),
        **{"optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=3e-3), **options},
    )  # fmt: skip


def rows(out: Generation) -> list[list[int]]:
    return [row[mask].tolist() for row, mask in zip(out.ids, out.mask, strict=True)]


def check_greedy(engine: Engine, policy: Policy, tokenizer: Any, stop: list[str]) -> None:
    """Compare an engine's greedy responses with the policy's own: tokens, ends, and log-probabilities."""
    sampling = Sampling(temperature=0, max_new_tokens=20, stop=stop)
    prompts = [[3 + (i * k) % 17 for i in range(1, 9 + k)] for k in range(1, 17)]
    uid = torch.tensor([(0, i, 0) for i in range(16)])
    theirs = engine.generate(policy, tokenizer, prompts, uid, sampling, 0)
    ours = InProcessEngine().generate(policy, tokenizer, prompts, uid, sampling, 0)
    assert rows(theirs) == rows(ours)
    assert len({len(row) for row in rows(ours)}) > 2
    assert torch.equal(theirs.truncated, ours.truncated)
    torch.testing.assert_close(theirs.logprobs, ours.logprobs * ours.mask, rtol=0, atol=TOLERANCE)
