"""The last layer computes what is read: the same loss and gradients, from fewer rows, wherever a policy is trained."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import test_fsdp1
import test_sharding
import torch
from runs import FLOAT32_NORMS, whole
from test_layout import CPU, choose, laid_out, ragged
from tiny_models import COMMON, ROPE, VOCABULARY, WINDOW, build, save
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
from lit_rlvr.segments import hidden_states
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
    """Of rows that share their prompts."""
    return list(cut(rollout, chosen, budget, None, Reader(CPU, "shared"), LocalReduce()))


def few() -> tuple[RolloutBatch, list[tuple[MicroBatch, bool]]]:
    """A rollout, and micro-batches of some of its tokens, of which two are read at one place."""
    rollout = ragged([3, 1, 4], 5)
    micros = micro_batches(rollout, choose(rollout, 0.3, 0))
    assert len(micros) > 1
    assert all(micro.pack is not None and micro.pack.read is not None for micro, _ in micros)
    assert any(len(set(micro.index.tolist())) < len(micro.index) for micro, _ in micros)
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


def test_what_is_not_read_is_finite() -> None:
    """Norms of zeros among it; and the gradients of what attention gave there are exactly zero."""
    policy = policy_of("gemma3_text")
    _, [(micro, _), *_] = few()
    gradient: list[Tensor] = []
    out: Any = policy.hf.base_model.layers[-1].self_attn.o_proj
    out.register_forward_hook(lambda module, args, output: output.register_hook(gradient.append) and None)
    hidden = hidden_states(policy.hf.base_model, micro.ids, micro.pack)
    assert hidden.isfinite().all()
    hidden[0, micro.index].sum().backward()
    read = torch.zeros(micro.ids.numel(), dtype=torch.bool).index_fill(0, micro.index, True)
    assert torch.equal((gradient[0][0] != 0).any(-1), read)


def test_adapters(tmp_path: Path) -> None:
    """Of every linear layer, once they have left zero."""
    pytest.importorskip("peft", reason="the extra lit-rlvr[lora] is not installed")
    policy = load_policy(save(tmp_path, "llama"), "float64", lora=LoRA(), layout=None)
    for layer in tuned_layers(policy):
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.3)
    few, every = both(policy)
    torch.testing.assert_close(few, every, **FLOAT32_NORMS)


def test_autocast() -> None:
    """It rounds as often as it does when all places are computed: the errors are of one size."""
    exact, policy = both(policy_of("qwen2"))[1], policy_of("qwen2")
    policy.float()
    with torch.autocast("cpu", torch.bfloat16):
        few, every = both(policy)
    wanted = flat(exact)
    few_off, every_off = ((flat(found) - wanted).norm() for found in (few, every))
    assert 0 < every_off < 0.1 * wanted.norm()
    # As many roundings of the same numbers; sums of other lengths may round the other way.
    assert few_off < 1.5 * every_off


def flat(tensors: list[Tensor]) -> Tensor:
    """All numbers in one row."""
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])


@pytest.mark.usefixtures("group")
@pytest.mark.filterwarnings("ignore:FSDP is switching")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["fsdp1", "fsdp2"])
def test_sharded(kind: str, checkpointing: bool, tmp_path: Path) -> None:
    """Layers are other classes, and hooked, under FSDP."""
    path, options = save(tmp_path, "qwen3"), {"gradient_checkpointing": checkpointing, "layout": None}
    sharded: Any
    if kind == "fsdp1":
        sharded = wrap(load_policy(path, "float64", **options), test_fsdp1.started())
    else:
        sharded = load_sharded(path, "float64", test_sharding.started(), **options)
    rollout, micros = few()
    plain = load_policy(path, "float64", layout=None)
    inside: list[int] = []
    sharded.hf.base_model.layers[-1].mlp.down_proj.register_forward_pre_hook(
        lambda module, args: inside.append(args[0].shape[1])
    )
    for policy, each in ((sharded, micros), (plain, all_read(micros))):
        for micro in each:
            laid_out(policy, rollout, [micro], selected=True).backward()
    found, wanted = ([whole(p.grad) for p in policy.parameters()] for policy in (sharded, plain))
    torch.testing.assert_close(found, wanted, **FLOAT32_NORMS)
    times = 2 if checkpointing else 1
    assert inside == [len(set(micro.index.tolist())) for micro, _ in micros for _ in range(times)]


def test_a_critic(tmp_path: Path) -> None:
    """Prompts are many of its places, of which it reads the last ones."""
    critic = ValueModel(save(tmp_path, "llama"), "float64", layout=None)
    torch.nn.init.normal_(critic.head.weight)
    rollout = ragged([3, 1, 4], 5, longest=2)
    [(micro, _)] = micro_batches(rollout, rollout.response_mask, 10**6)
    [(every, _)] = all_read([(micro, True)])
    assert micro.pack is not None
    assert micro.pack.read is not None
    values = [critic(m.ids, m.index, m.pack) for m in (micro, every)]
    torch.testing.assert_close(*values, **FLOAT32_NORMS)
    found = [torch.autograd.grad(v.square().sum(), list(critic.parameters())) for v in values]
    torch.testing.assert_close(*found, **FLOAT32_NORMS)


def test_generation_is_as_before() -> None:
    """Also after a pack has been through the model, and again for its backward pass."""
    before, policy = policy_of("llama"), policy_of("llama")
    recompute_activations(policy.hf)
    both(policy)
    ids = torch.randint(2, VOCABULARY, (3, 7))
    torch.testing.assert_close(policy.eval().hf(ids).logits, before.eval().hf(ids).logits, rtol=0, atol=0)


def test_without_weights() -> None:
    """On the meta device it has the shapes that it has elsewhere."""
    policy = policy_of("llama").to("meta")
    _, [(micro, _), *_] = few()
    micro = micro.to(torch.device("meta"))
    assert hidden_states(policy.hf.base_model, micro.ids, micro.pack).shape == (1, micro.ids.numel(), 16)


def test_layers_that_need_more_than_what_is_read_are_refused() -> None:
    """As if keys were made of queries: every pack is right of which all is read, and no other."""
    hf = build("llama")
    choose_layout(hf, "packed")
    attention = hf.model.layers[-1].self_attn
    attention.k_proj.forward = lambda x: attention.q_proj(x)[..., :8]
    with pytest.raises(ValueError, match="does not give in a pack what it gives for rows on their own"):
        check_packs(hf)


def test_places_read() -> None:
    """Each once; all of them, if they are more than it is worth."""
    for total in (1, 8, 100):
        for number in range(total + 1):
            found = places_read(torch.arange(number).repeat(2).flip(0), total)
            assert (found is None) == (number > WORTH * total)
            assert found is None or found.tolist() == list(range(number))
