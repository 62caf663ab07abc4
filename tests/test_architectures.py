"""Models that are known without the hub."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_rlvr.activations import Pass
from lit_rlvr.architectures import known_config, known_models, model_config
from lit_rlvr.memory import Numbers, estimate

PUBLISHED = {
    "Qwen/Qwen3-0.6B": 596_049_920, "Qwen/Qwen3-1.7B-Base": 1_720_574_976, "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B-Base": 8_190_735_360, "Qwen/Qwen3-14B-Base": 14_768_307_200, "Qwen/Qwen3-32B": 32_762_123_264,
    "Qwen/Qwen2.5-7B": 7_615_616_512, "Qwen/Qwen2.5-Math-7B": 7_615_616_512,
}  # fmt: skip
"""Parameters, as the hub's model pages give them, rounded, and the weight files exactly."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_the_published_ones(name: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(known_config(name))
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name]


def test_contexts() -> None:
    names = ("Qwen/Qwen3-8B-Base", "Qwen/Qwen3-8B", "Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-Math-7B")
    assert [known_config(name).max_position_embeddings for name in names] == [32_768, 40_960, 131_072, 4096]
    assert known_config("Qwen/Qwen3-32B-Base") is None
    assert len(set(known_models())) == len(known_models()) == 13


def test_the_hub_comes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A folder is read; a model out of reach is known, or refused."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    config, there = model_config("builtin:tiny-qwen3-75k")
    assert (config.hidden_size, there) == (64, True)
    config, there = model_config("Qwen/Qwen3-4B-Base")
    assert (config.hidden_size, there) == (2560, False)
    with pytest.raises(ValueError, match="there is no folder nobody/nothing"):
        model_config("nobody/nothing")


@pytest.mark.parametrize(("name", "checkpointing"), [("Qwen/Qwen3-0.6B", False), ("Qwen/Qwen2.5-7B", True)])
def test_what_two_layers_say_of_all(name: str, checkpointing: bool) -> None:
    """The same numbers to the byte as from the whole model."""
    config, forward = known_config(name), Pass(2, 100, torch.bfloat16)
    assert forward._of_layers(config, checkpointing) == forward._on_fake_tensors(config, checkpointing)


def test_the_memory_of_a_critic() -> None:
    """A body without a head: weights and two states of the optimizer in rollouts, gradients too in a step."""
    config = known_config("Qwen/Qwen3-8B-Base")
    without = estimate(config, Numbers("bfloat16"), micro_rows=1, width=64, rollout_rows=1)
    memory = estimate(config, Numbers("bfloat16"), micro_rows=1, width=64, rollout_rows=1, critic=config)
    body = PUBLISHED["Qwen/Qwen3-8B-Base"] - 151_936 * 4096
    assert memory.critic == 3 * 2 * body
    assert memory.critic_step == 2 * body + memory.activations
    assert memory.rollout == without.rollout + memory.critic
    assert memory.training == without.training + memory.critic + memory.critic_step
    small = estimate(
        known_config("Qwen/Qwen3-0.6B"), Numbers("bfloat16", share=0.5), micro_rows=1, width=64, rollout_rows=1,
        optimizer="SGD", critic=known_config("Qwen/Qwen3-1.7B"),
    )  # fmt: skip
    assert small.critic == PUBLISHED["Qwen/Qwen3-1.7B-Base"]
