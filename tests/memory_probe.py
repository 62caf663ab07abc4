"""Measures the peak of what torch allocates in a few optimiser steps; started by test_explain.py in its own process."""

from __future__ import annotations

import sys

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks.memory_side import largest
from lit_rlvr.memory import estimate
from lit_rlvr.policy import Policy, recompute_activations

SIZES = {"small": (512, 192, 4, 576, 32, 128), "medium": (16384, 256, 6, 768, 8, 128)}


def configuration(size: str) -> Qwen3Config:
    """A Qwen3 of one of the sizes."""
    vocabulary, hidden, layers, feed_forward, _, _ = SIZES[size]
    return Qwen3Config(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=feed_forward, num_hidden_layers=layers,
        num_attention_heads=hidden // 32, num_key_value_heads=hidden // 64, head_dim=32, tie_word_embeddings=True,
    )  # fmt: skip


def measured(size: str, checkpointing: bool) -> int:
    """Peak bytes of two optimiser steps of two micro-batches each; the second step has the optimizer's state."""
    config, (vocabulary, *_, rows, width) = configuration(size), SIZES[size]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        policy = Policy(Qwen3ForCausalLM(config).train())
        if checkpointing:
            recompute_activations(policy.hf)
        optimizer = torch.optim.AdamW(policy.parameters())
        for number in range(4):
            ids = torch.randint(vocabulary, (rows, width))
            index = torch.randint(rows * width, (rows * width // 2,))
            targets = torch.randint(vocabulary, index.shape)
            if number % 2 == 0:
                optimizer.zero_grad()
            policy(ids, index, targets, 1.0, lambda logprobs, entropies, part: -logprobs.sum()).backward()
            if number % 2 == 1:
                optimizer.step()
    return largest(record)


def main(size: str, checkpointing: bool) -> None:
    """Print estimate and measurement in bytes."""
    *_, rows, width = SIZES[size]
    memory = estimate(
        configuration(size), dtype="float32", micro_rows=rows, width=width, rollout_rows=0,
        gradient_checkpointing=checkpointing,
    )  # fmt: skip
    print(memory.training, measured(size, checkpointing))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], sys.argv[2] == "checkpointing")
