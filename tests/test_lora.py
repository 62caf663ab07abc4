"""Adapters: they learn and nothing else does, they can be switched off, saved alone and merged."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import TINY as TINY_FIT
from command_line import UNTRACKED, succeed
from runs import TINY, tiny_module, train
from safetensors.torch import load_file
from test_ahead import Watch, fit, follows, make
from tiny_models import save

from lit_rlvr import RLVRModule
from lit_rlvr.export import export
from lit_rlvr.lora import LoRA, WithoutAdapters, adapter_parameters, adapters_off, tuned_layers
from lit_rlvr.memory import Numbers, estimate
from lit_rlvr.models import resolve_model
from lit_rlvr.policy import load_policy
from lit_rlvr.saving import SavePolicy
from lit_rlvr.weights import named_weights

pytest.importorskip("peft", reason="the extra lit-rlvr[lora] is not installed")

INPUTS: tuple[Any, ...] = (torch.tensor([[3, 4, 5, 6]]), torch.tensor([0, 1, 2]), torch.tensor([4, 5, 6]))


def trained_policy(path: str, lora: LoRA = LoRA(), dtype: str = "float64") -> Any:
    """A policy whose adapters have left zero."""
    policy = load_policy(path, dtype, lora=lora)
    with torch.no_grad():
        for layer in tuned_layers(policy):
            torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.3, generator=torch.Generator().manual_seed(1))
    return policy


@pytest.mark.parametrize("family", ["qwen3", "llama", "gpt2"])
def test_adapters_begin_at_the_model_and_can_be_switched_off(family: str, tmp_path: Path) -> None:
    path = save(tmp_path, family)
    plain, fresh, moved = load_policy(path, "float64"), load_policy(path, "float64", lora=LoRA()), trained_policy(path)
    torch.testing.assert_close(fresh(*INPUTS), plain(*INPUTS))
    assert not torch.allclose(moved(*INPUTS)[0], plain(*INPUTS)[0])
    assert torch.equal(WithoutAdapters(moved)(*INPUTS)[0], plain(*INPUTS)[0])
    with adapters_off(moved):
        assert torch.equal(moved(*INPUTS)[0], plain(*INPUTS)[0])
    assert {name.split(".")[-3] for name, p in moved.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    assert all(p.requires_grad == (".lora_" in name) for name, p in moved.named_parameters())


@pytest.mark.parametrize(("dtype", "wide"), [("bfloat16", torch.float32), ("float64", torch.float64)])
@pytest.mark.parametrize("empty", [False, True])
def test_adapters_are_kept_in_float32_at_least(dtype: str, wide: torch.dtype, empty: bool, tmp_path: Path) -> None:
    policy = load_policy(save(tmp_path, "llama"), dtype, lora=LoRA(), empty=empty)
    assert {p.dtype for p in policy.parameters() if p.requires_grad} == {wide}
    assert {p.dtype for p in policy.parameters() if not p.requires_grad} == {getattr(torch, dtype)}
    if not empty:
        assert torch.isfinite(policy(*INPUTS)[0]).all()


def test_the_low_rank_product_is_what_is_added(tmp_path: Path) -> None:
    """W + alpha / r B A (Hu et al. 2021, section 4.1), in every layer that is named and no other."""
    path = save(tmp_path, "llama")
    lora = LoRA(r=2, alpha=6, target_modules=["q_proj", "down_proj"])
    moved, by_hand = trained_policy(path, lora), load_policy(path, "float64")
    layers = [name for name, _ in by_hand.named_modules() if name.endswith(("q_proj", "down_proj"))]
    assert len(layers) == len(tuned_layers(moved)) == 4
    with torch.no_grad():
        for name in layers:
            layer: Any = moved.get_submodule(name)
            product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
            by_hand.get_submodule(name).weight += 6 / 2 * product
    torch.testing.assert_close(moved(*INPUTS), by_hand(*INPUTS))


@pytest.mark.parametrize(("layer", "place"), [("lm_head", "head"), ("embed_tokens", "embedding")])
def test_the_head_is_refused(layer: str, place: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"names .*{layer}, the {place} of LlamaForCausalLM"):
        load_policy(save(tmp_path, "llama"), lora=LoRA(target_modules=["q_proj", layer]))


def test_settings_are_checked(tmp_path: Path) -> None:
    for wrong in ({"r": 0}, {"alpha": 0}, {"target_modules": []}):
        with pytest.raises(ValueError, match="lora needs r and alpha above 0"):
            LoRA(**wrong)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no layer 'k_prj'; did you mean k_proj\?"):
        load_policy(save(tmp_path, "llama"), lora=LoRA(target_modules=["q_proj", "k_prj"]))
    with pytest.raises(ValueError, match=r"must be all-linear or a list of names, as in .*, got 'q_proj'"):
        LoRA(target_modules="q_proj")


def test_only_adapters_learn_and_gradient_checkpointing_changes_nothing() -> None:
    """And the frozen head costs no gradient; generation has the adapters on, so the first ratio is one."""
    plain, checkpointed = (tiny_module(lora=LoRA(), gradient_checkpointing=recompute) for recompute in (False, True))
    one, two = train(plain, 4), train(checkpointed, 4)
    assert all(".lora_" in name for gradients in one.gradients for name in gradients)
    torch.testing.assert_close(one.gradients, two.gradients)
    start = load_policy(resolve_model(TINY), "float64").state_dict()
    after = {name.replace(".base_layer", ""): value for name, value in plain.policy.state_dict().items()}
    assert all(torch.equal(after[name], value) for name, value in start.items())
    assert any(value.abs().max() > 0 for name, value in after.items() if ".lora_B." in name)
    assert one.metrics[2]["train/ratio_max"] == pytest.approx(1.0, abs=1e-5)  # a phase's first update, adapters moved


def test_the_reference_is_the_policy_with_its_adapters_off() -> None:
    """The same gradients as with a second copy of the model."""
    from lit_rlvr.kl import KLPenalty

    shared = train(tiny_module(lora=LoRA(), kl=KLPenalty(0.5)), 4)
    second = train(tiny_module(lora=LoRA(), kl=KLPenalty(0.5), reference=TINY), 4)
    torch.testing.assert_close(shared.gradients, second.gradients)
    assert shared.metrics[-1]["train/kl_ref"] > 0


def test_saved_alone_opened_and_exported_merged(tmp_path: Path) -> None:
    """The folder of adapters, opened, and the exported checkpoint are both the trained policy."""
    module = tiny_module(lora=LoRA())
    train(module, 2, SavePolicy(str(tmp_path / "policy")))
    module.trainer.save_checkpoint(tmp_path / "last.ckpt")
    names = {p.name for p in (tmp_path / "policy").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names
    assert not names & {"config.json", "model.safetensors"}
    export(tmp_path / "last.ckpt", tmp_path / "merged")
    exported, opened = (load_policy(str(tmp_path / name), "float64") for name in ("merged", "policy"))
    torch.testing.assert_close(exported(*INPUTS), module.policy(*INPUTS))
    torch.testing.assert_close(opened(*INPUTS), module.policy(*INPUTS))
    start = load_policy(resolve_model(TINY), "float64")
    assert not torch.allclose(opened(*INPUTS)[0], start(*INPUTS)[0], atol=1e-6)
    pushed, written = dict(named_weights(module.policy)), load_file(tmp_path / "merged/model.safetensors")
    assert pushed.keys() == written.keys()
    assert all(torch.equal(pushed[name], tensor) for name, tensor in written.items())
    again = RLVRModule(str(tmp_path / "policy"), dtype="float64")
    again.configure_model()
    assert again.tokenizer.decode([5, 6])
    torch.testing.assert_close(again.policy(*INPUTS), module.policy(*INPUTS))


@pytest.mark.parametrize("family", ["qwen3", "llama", "gpt2"])
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_weights_leave_for_an_engine_with_the_adapters_added(family: str, dtype: str, tmp_path: Path) -> None:
    """Bit for bit those that peft merges, tied or not, transposed or not; the policy keeps its own."""
    moved = trained_policy(save(tmp_path, family), LoRA(r=2, alpha=6), dtype)
    before = {name: tensor.clone() for name, tensor in moved.hf.state_dict().items()}
    given = dict(named_weights(moved))
    assert all(torch.equal(tensor, before[name]) for name, tensor in moved.hf.state_dict().items())
    peft = copy.deepcopy(moved.hf)
    for layer in tuned_layers(peft):
        layer.merge()
    wanted = {name.replace(".base_layer.", "."): tensor for name, tensor in peft.state_dict().items()}
    plain = dict(named_weights(load_policy(str(tmp_path), dtype)))
    assert given.keys() == plain.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in given.items())
    assert {tensor.dtype for tensor in given.values()} == {getattr(torch, dtype)}
    changed = {name.split(".")[-2] for name in given if not torch.equal(given[name], plain[name])}
    assert changed == {name.split(".")[-3] for name in before if name.endswith(".base_layer.weight")}


def test_a_server_follows_the_adapters() -> None:
    """Its log-probabilities are the training model's, phase after phase, while the adapters move."""
    watch = Watch()
    with follows() as (fake, address):
        recorder = fit(make(address, overlap=False, lora=LoRA(), optimizer=large_steps), 3, watch)
        assert fake.called("/update_weight_version") == 3
    for rollout in watch.rollouts:
        assert rollout.engine_logprobs is not None
        torch.testing.assert_close(rollout.engine_logprobs, rollout.old_logprobs)
    moved = watch.rollouts[2].old_logprobs - watch.rollouts[0].old_logprobs
    assert float(moved.abs().max()) > 1e-2
    assert recorder.metrics[4]["rollout/engine_ratio_max"] < 1 + 1e-4


def large_steps(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=3e-2)


def test_from_the_command_line(tmp_path: Path) -> None:
    """The fragment trains, and what it saves can be validated."""
    fragment = ("--config", str(Path(__file__).parents[1] / "configs/model/lora.yaml"))
    root = f"--trainer.default_root_dir={tmp_path}/run"
    succeed(tmp_path, "fit", *TINY_FIT, *fragment, UNTRACKED, root)
    assert all("lora_" in name for name in load_file(tmp_path / "run/policy/adapter_model.safetensors"))
    printed = succeed(tmp_path, "validate", *TINY_FIT, UNTRACKED, root, f"--model.model={tmp_path}/run/policy")
    assert "mean_at_1" in printed.out + printed.err


@pytest.mark.parametrize("lora", [LoRA(), LoRA(r=3, target_modules=["q_proj", "down_proj"])], ids=["all", "named"])
def test_explain_knows_what_adapters_take(lora: LoRA) -> None:
    """As many parameters as peft makes; gradients and optimizer state for these alone, and no reference model."""
    policy = load_policy(resolve_model(TINY), lora=lora)
    config, trained = policy.hf.config, sum(p.numel() for p in policy.parameters() if p.requires_grad)
    assert adapter_parameters(config, lora) == trained
    sizes: dict[str, Any] = {"numbers": Numbers("bfloat16"), "micro_rows": 2, "width": 8, "rollout_rows": 2}
    whole, memory = estimate(config, **sizes), estimate(config, **sizes, adapters=trained)
    assert memory.weights == whole.weights + 4 * trained
    assert (memory.gradients, memory.optimizer) == (4 * trained, 8 * trained)
    assert whole.head - memory.head == (4 + 2) * config.vocab_size * config.hidden_size
