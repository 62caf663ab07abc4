"""Measures the peak of what torch allocates in a few optimiser steps; started by test_explain.py in its own process."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from runs import tiny_module, tiny_trainer
from torch.profiler import ProfilerActivity, profile
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks.memory_side import largest
from lit_rlvr.memory import Numbers, estimate
from lit_rlvr.policy import load_policy
from lit_rlvr.sharding import FSDP2Strategy, open_model

SIZES = {"small": (512, 192, 4, 576, 32, 128), "medium": (16384, 256, 6, 768, 8, 128)}


@dataclass(frozen=True)
class Mode:
    """How a run keeps and computes.

    Args:
        numbers: As ``explain`` has them; a share below 1 is that of one of several processes.
        checkpointing: Whether activations are recomputed.
    """

    numbers: Numbers = field(default_factory=Numbers)
    checkpointing: bool = False


MODES = {
    "plain": Mode(),
    "checkpointing": Mode(checkpointing=True),
    "bfloat16": Mode(Numbers("bfloat16"), checkpointing=True),
    "autocast": Mode(Numbers(autocast=True)),
    "sharded": Mode(Numbers(computes="bfloat16", share=0.5), checkpointing=True),
}


def configuration(size: str) -> Qwen3Config:
    """A Qwen3 of one of the sizes."""
    vocabulary, hidden, layers, feed_forward, _, _ = SIZES[size]
    return Qwen3Config(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=feed_forward, num_hidden_layers=layers,
        num_attention_heads=hidden // 32, num_key_value_heads=hidden // 64, head_dim=32, tie_word_embeddings=True,
    )  # fmt: skip


def started(mode: Mode, rank: int, port: int) -> FSDP2Strategy | None:
    """A strategy as Lightning sets it up on two CPU devices, or none."""
    if mode.numbers.share == 1:
        return None
    torchrun = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": 2, "RANK": rank, "LOCAL_RANK": rank}
    os.environ.update({name: str(value) for name, value in torchrun.items()})
    narrow: Any = mode.numbers.computes
    strategy = FSDP2Strategy(param_dtype=narrow)
    strategy.parallel_devices = [torch.device("cpu")] * 2
    strategy.cluster_environment = TorchElasticEnvironment()
    strategy._lightning_module = tiny_module()
    strategy.accelerator = tiny_trainer(1, []).accelerator
    strategy.setup_environment()
    return strategy


def measured(size: str, mode: Mode, path: str, rank: int, port: int) -> int:
    """Peak bytes of two optimiser steps of two micro-batches each; the second step has the optimizer's state."""
    torch.set_num_threads(1)
    vocabulary, *_, rows, width = SIZES[size]
    strategy = started(mode, rank, port)
    policy = open_model(load_policy, path, mode.numbers.dtype, strategy, gradient_checkpointing=mode.checkpointing)
    optimizer = torch.optim.AdamW(policy.parameters())
    held = sum(getattr(p, "_local_tensor", p).numel() * p.element_size() for p in policy.parameters())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        for number in range(4):
            generator = torch.Generator().manual_seed(number)
            ids = torch.randint(vocabulary, (rows, width), generator=generator)
            index = torch.randint(rows * width, (rows * width // 2,), generator=generator)
            targets = torch.randint(vocabulary, index.shape, generator=generator)
            if number % 2 == 0:
                optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=mode.numbers.autocast):
                loss = policy(ids, index, targets, 1.0, lambda logprobs, entropies, part: -logprobs.sum())
            loss.backward()
            if number % 2 == 1:
                optimizer.step()
    return held + largest(record)


def main(size: str, mode: Mode) -> None:
    """Print estimate and measurement in bytes."""
    *_, rows, width = SIZES[size]
    memory = estimate(
        configuration(size), mode.numbers, micro_rows=rows, width=width, rollout_rows=0,
        gradient_checkpointing=mode.checkpointing,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as path:
        Qwen3ForCausalLM(configuration(size)).save_pretrained(path)
        port = find_free_network_port()
        if mode.numbers.share < 1:
            spawn = multiprocessing.get_context("spawn")
            spawn.Process(target=measured, args=(size, mode, path, 1, port), daemon=True).start()
        print(memory.training, measured(size, mode, path, 0, port))


if __name__ == "__main__":
    main(sys.argv[1], MODES[sys.argv[2]])
