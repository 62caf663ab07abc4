"""The last layer computes what is read: the same loss and gradients, from fewer rows, wherever a policy is trained."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import test_fsdp1
import test_sharding
import torch
from runs import FLOAT32_NORMS, whole
from test_layout import CPU, KINDS, choose, gradients, laid_out, ragged
from tiny_models import COMMON, ROPE, WINDOW, build, save
from torch import Tensor
from torch.nn.functional import rms_norm
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from lit_rlvr.critic import ValueModel
from lit_rlvr.fsdp1 import wrap
from lit_rlvr.last_layer import WORTH, places_read
from lit_rlvr.layout import KNOWN, Reader, check_packs, choose_layout
from lit_rlvr.lora import LoRA, tuned_layers
from lit_rlvr.microbatch import MicroBatch, cut
from lit_rlvr.policy import Policy, load_policy, recompute_activations
from lit_rlvr.reduce import LocalReduce
from lit_rlvr.sharding import load_sharded
from lit_rlvr.types import RolloutBatch

MORE: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    "mistral": {"sliding_window": 4},
    "smollm3": {"no_rope_layer_interval": 2},
    "gemma3_text": {**WINDOW, "query_pre_attn_scalar": 8},
    "granite": {"residual_multiplier": 0.5},
    "qwen2": {"attention_bias": True},
}
FUSED = {"gpt2": {"attn.c_proj", "mlp"}, "phi3": {"self_attn.o_proj", "mlp"}}
PROJECTIONS = {"self_attn.q_proj", "self_attn.o_proj", "mlp"}


def policy_of(kind: str, **options: Any) -> Policy:
    """A random float64 policy of a kind that computes packs."""
    basis = COMMON if kind == "gpt2" else ROPE
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **{**basis, **MORE.get(kind, {}), **options})
        hf = AutoModelForCausalLM.from_config(config).double()
        for name, parameter in hf.named_parameters():  # biases begin at zero
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter)
    for norm in hf.modules():
        if isinstance(norm, Qwen3RMSNorm):
            norm.forward = partial(rms_norm, normalized_shape=norm.weight.shape, weight=norm.weight, eps=1e-6)
    policy = Policy(hf)
    policy.layout = choose_layout(hf, None)
    check_packs(hf)
    return policy.train()


def micro_batches(rollout: RolloutBatch, chosen: Tensor, budget: int = 20) -> list[tuple[MicroBatch, bool]]:
    """Several, of which each leaves out most places."""
    return list(cut(rollout, chosen, budget, None, Reader(CPU, "shared"), LocalReduce()))


def few() -> tuple[RolloutBatch, list[tuple[MicroBatch, bool]]]:
    """A rollout, and micro-batches of some of its tokens."""
    rollout = ragged([3, 1, 4], 5)
    micros = micro_batches(rollout, choose(rollout, 0.3, 5))
    assert len(micros) > 1
    return rollout, micros


def all_read(micros: list[tuple[MicroBatch, bool]]) -> list[tuple[MicroBatch, bool]]:
    """The same, said to be read everywhere."""
    packs = [micro.pack and replace(micro.pack, read=None) for micro, _ in micros]
    return [(replace(micro, pack=pack), last) for (micro, last), pack in zip(micros, packs, strict=True)]


def trained(policy: Policy) -> list[Tensor]:
    """What learns."""
    return [p for p in policy.parameters() if p.requires_grad]


def both(policy: Policy) -> list[list[Tensor]]:
    """Loss and gradients of all micro-batches together: computed where they are read, and everywhere."""
    rollout, micros = few()
    found = []
    for each in (micros, all_read(micros)):
        loss = laid_out(policy, rollout, each, selected=True)
        found.append([loss, *torch.autograd.grad(loss, trained(policy))])
    return found


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KNOWN)
def test_loss_and_gradients_are_the_same(kind: str, checkpointing: bool) -> None:
    """All families; also where every micro-batch is computed again once the last has been through the model."""
    policy = policy_of(kind)
    if checkpointing:
        recompute_activations(policy.hf)
    few, every = both(policy)
    torch.testing.assert_close(few, every, **({} if kind in ("qwen3", "gpt2") else FLOAT32_NORMS))


@pytest.mark.parametrize("kind", KNOWN)
def test_linear_layers_are_given_only_what_is_read(kind: str) -> None:
    """In the last layer, apart from those that make keys and values; others are given every place."""
    policy = policy_of(kind)
    _, [(micro, _), *_] = few()
    given: dict[str, int] = {}
    linear = [
        (name, module)
        for name, module in policy.hf.base_model.named_modules()
        if not list(module.children()) and getattr(module, "weight", torch.empty(0)).dim() == 2 and "." in name
    ]

    def look(module: Any, args: tuple[Tensor], name: str) -> None:
        given[name] = args[0].shape[1]

    for name, module in linear:
        module.register_forward_pre_hook(partial(look, name=name))
    policy(micro.ids, micro.index, micro.targets, pack=micro.pack)
    everything, some = micro.ids.numel(), len(set(micro.index.tolist()))
    assert some < everything
    keys = ("k_proj", "v_proj", "qkv_proj", "c_attn")
    last = linear[-1][0].rsplit(".", 2)[0]
    for name, _ in linear:
        whole = not name.startswith(last) or name.endswith(keys)
        assert given.pop(name) == (everything if whole else some), name
    assert not given


def test_places_read() -> None:
    """Each once; all of them, if they are more than it is worth."""
    for total in (1, 8, 100):
        for number in range(total + 1):
            found = places_read(torch.arange(number).repeat(2).flip(0), total)
            assert (found is None) == (number > WORTH * total)
            assert found is None or found.tolist() == list(range(number))
