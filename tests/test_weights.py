"""Weights that leave for an engine, against what ``save_pretrained`` writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import FAMILIES, build, save
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from lit_rlvr.policy import Policy, load_policy
from lit_rlvr.weights import named_weights


def experts() -> PreTrainedModel:
    """A mixture of experts, which transformers holds in one tensor per layer and checkpoints have one by one."""
    config = Qwen3MoeConfig(
        vocab_size=20, hidden_size=16, intermediate_size=16, moe_intermediate_size=8, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_experts=3, num_experts_per_tok=2,
        tie_word_embeddings=False,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config)


def same(policy: Policy, folder: Path) -> None:
    """The generator's weights are those of the folder's file: names, shapes, values, each once."""
    given = list(named_weights(policy))
    written = load_file(folder / "model.safetensors")
    assert len(given) == len(written)
    assert {name for name, _ in given} == set(written)
    for name, tensor in given:
        assert torch.equal(tensor, written[name]), name


@pytest.mark.parametrize("family", [*FAMILIES, "experts"])
def test_they_are_what_a_checkpoint_has(family: str, tmp_path: Path) -> None:
    """Tied and untied, and with tensors that are split on the way; of a new model and of one that was loaded."""
    model = experts() if family == "experts" else build(family)
    model.save_pretrained(tmp_path)
    same(Policy(model), tmp_path)
    same(load_policy(str(tmp_path)), tmp_path)


def test_they_follow_training(tmp_path: Path) -> None:
    """Values are those at the moment of asking, without gradients."""
    policy = load_policy(save(tmp_path, "qwen3"))
    before = {name: tensor.clone() for name, tensor in named_weights(policy)}
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(1.0)
    for name, tensor in named_weights(policy):
        assert not tensor.requires_grad
        assert torch.equal(tensor, before[name] + 1.0)
