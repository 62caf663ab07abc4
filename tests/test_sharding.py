"""Sharded policies, in one process: what FSDP2 does to the weights and to what the policy is given."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment
from runs import TINY, tiny_module, tiny_trainer, train
from tiny_models import char_tokenizer, random_prompts, save
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile

from lit_rlvr.engines import InProcessEngine, Sampling
from lit_rlvr.lora import LoRA
from lit_rlvr.memory import Numbers, estimate
from lit_rlvr.models import resolve_model
from lit_rlvr.policy import DTYPES, Policy, load_policy
from lit_rlvr.sharding import (
    FSDP2Strategy,
    compute_precision,
    gathered,
    load_sharded,
    sync_gradients,
    whole_weights,
)


def started(**options: Any) -> FSDP2Strategy:
    """A strategy as Lightning sets it up, on one CPU device."""
    strategy = FSDP2Strategy(**options)
    strategy.parallel_devices = [torch.device("cpu")]
    strategy.cluster_environment = LightningEnvironment()
    strategy._lightning_module = tiny_module()
    strategy.accelerator = tiny_trainer(1, []).accelerator
    strategy.setup_environment()
    return strategy


@dataclass
class Facts:
    """A token loss whose facts would be rounded, if FSDP2 cast them to bfloat16 as it casts inputs."""

    old: Tensor
    seen: list[tuple[torch.dtype, torch.dtype, Tensor]] = field(default_factory=list)

    def __call__(self, logprobs: Tensor, entropies: Tensor, part: slice) -> Tensor:
        self.seen.append((logprobs.dtype, entropies.dtype, self.old[part]))
        return (logprobs * self.old[part]).sum()


INPUTS: tuple[Any, ...] = (torch.tensor([[3, 4, 5, 6]]), torch.tensor([0, 1, 2]), torch.tensor([4, 5, 6]), 1.0)


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("family", ["qwen3", "llama", "gemma2", "gemma3", "gpt2", "granite"])
def test_a_sharded_policy_is_the_policy(family: str, tmp_path: Path) -> None:
    """Tied and untied heads, every kind of rotary buffer: the meta device leaves nothing out."""
    path = save(tmp_path, family)
    plain, sharded = load_policy(path), load_sharded(path, "float32", started())
    assert all(isinstance(p, DTensor) for p in sharded.parameters())
    torch.testing.assert_close(sharded(*INPUTS), plain(*INPUTS))
    weights = whole_weights(sharded)
    assert {n: w.shape for n, w in weights.items()} == {n: w.shape for n, w in plain.state_dict().items()}
    for policy in (plain, sharded):
        policy(*INPUTS, Facts(torch.tensor([0.5, -1.0, 2.0]))).backward()
    for (name, one), (_, two) in zip(plain.named_parameters(), sharded.named_parameters(), strict=True):
        if one.grad is not None:
            assert isinstance(two.grad, DTensor)
            torch.testing.assert_close(two.grad.full_tensor(), one.grad, msg=name)


@pytest.mark.usefixtures("group")
def test_facts_keep_their_precision() -> None:
    """The network computes in bfloat16; statistics of the head and the loss's own numbers stay float32."""
    policy = load_sharded(resolve_model(TINY), "float32", started(param_dtype="bfloat16"))
    dtypes: list[torch.dtype] = []
    policy.hf.base_model.norm.register_forward_hook(lambda module, given, out: dtypes.append(out.dtype))
    facts = Facts(torch.tensor([-12.3456, 0.1234567, 3.0]))
    policy(*INPUTS, facts).backward()
    assert dtypes == [torch.bfloat16]
    assert policy.narrowed == torch.bfloat16
    assert [(seen[0], seen[1]) for seen in facts.seen] == [(torch.float32, torch.float32)]
    assert torch.equal(facts.seen[0][2], torch.tensor([-12.3456, 0.1234567, 3.0]))
    assert {p.grad.dtype for p in policy.parameters() if p.grad is not None} == {torch.float32}


@pytest.mark.usefixtures("group")
def test_training_goes_on_after_generation(tmp_path: Path) -> None:
    """The same tokens as from a whole policy; afterwards weights are spread again and learn."""
    path = save(tmp_path, "qwen3")
    plain, sharded = load_policy(path), load_sharded(path, "float32", started())
    prompts, uid = random_prompts([3, 5]), torch.tensor([[0, draw, s] for draw in range(2) for s in range(2)])
    arguments = (char_tokenizer(), prompts, uid, Sampling(max_new_tokens=9), 0)
    ours = InProcessEngine().generate(sharded, *arguments)
    theirs = InProcessEngine().generate(plain, *arguments)
    assert torch.equal(ours.ids, theirs.ids)
    torch.testing.assert_close(ours.logprobs, theirs.logprobs)
    assert all(isinstance(p, DTensor) for p in sharded.parameters())
    for policy in (plain, sharded):
        policy(*INPUTS, Facts(torch.tensor([0.5, -1.0, 2.0]))).backward()
    torch.testing.assert_close(
        [whole.grad.full_tensor() for whole in sharded.parameters()], [p.grad for p in plain.parameters()]
    )


@pytest.mark.usefixtures("group")
def test_adapters_of_a_bfloat16_model_learn_in_float32(tmp_path: Path) -> None:
    """They are gathered in bfloat16 like everything else; their gradients come back in float32."""
    pytest.importorskip("peft", reason="the extra lit-rlvr[lora] is not installed")
    path = save(tmp_path, "llama")
    sharded = load_sharded(path, "bfloat16", started(), lora=LoRA())
    plain = load_policy(path, "bfloat16", lora=LoRA())
    # Adapters begin at zero, so the numbers are the model's own, rounded in the same places.
    torch.testing.assert_close(sharded(*INPUTS), plain(*INPUTS))
    sharded(*INPUTS, Facts(torch.tensor([0.5, -1.0, 2.0]))).backward()
    trained = [p for p in sharded.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {p.grad.dtype for p in trained if p.grad is not None} == {torch.float32}


def held(policy: Any, dtype: str) -> int:
    """Bytes that a micro-batch's forward and backward pass leave behind."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        policy(*INPUTS, Facts(torch.tensor([0.5, -1.0, 2.0], dtype=DTYPES[dtype]))).backward()
    assert record.profiler is not None
    results: Any = record.profiler.kineto_results
    return sum(event.nbytes() for event in results.events() if event.name() == "[memory]")


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize(
    ("dtype", "narrow"), [("float32", None), ("float32", "bfloat16"), ("bfloat16", None), ("float64", None)]
)
def test_gradients_wait_for_the_last_micro_batch(dtype: str, narrow: Literal["bfloat16"] | None) -> None:
    """They are those of reducing after each; until then they take the memory that ``explain`` says, in float32."""
    each, last = started(param_dtype=narrow), started(param_dtype=narrow)
    last.sync = "last"  # refused for the single device of this test
    policies = [load_sharded(resolve_model(TINY), dtype, strategy) for strategy in (each, last)]
    kept = []
    for policy, strategy in zip(policies, (each, last), strict=True):
        for number in range(3):
            sync_gradients(policy, strategy, number == 2)
            kept.append(held(policy, dtype))
            if strategy is last and number < 2:
                assert all(p.grad is None for p in policy.parameters())
    memory = estimate(
        policies[0].hf.config, Numbers(dtype, share=0.5, keeps_whole=True), micro_rows=1, width=4, rollout_rows=1
    )
    assert kept[3:5] == [memory.whole_gradients, 0]
    for one, two in zip(*(policy.parameters() for policy in policies), strict=True):
        # Three numbers of one size are added in another order: two roundings of the dtype that they are added in.
        tolerance = {"rtol": 1e-14, "atol": 1e-14} if dtype == "float64" else {"rtol": 1e-6, "atol": 1e-7}
        torch.testing.assert_close(two.grad.full_tensor(), one.grad.full_tensor(), **tolerance)


def test_a_single_device_has_nothing_to_wait_for() -> None:
    with pytest.raises(ValueError, match=r"sync: last spares a single device nothing.*leave it at each"):
        train(tiny_module(), 1, devices=1, strategy=FSDP2Strategy(sync="last"))


@pytest.mark.usefixtures("group")
def test_offloaded_weights_wait_on_the_cpu() -> None:
    """On a machine without a GPU both devices are the CPU; results are the same."""
    plain = load_policy(resolve_model(TINY))
    offloaded = load_sharded(resolve_model(TINY), "float32", started(cpu_offload=True))
    assert offloaded.device == offloaded.placed == torch.device("cpu")
    torch.testing.assert_close(offloaded(*INPUTS), plain(*INPUTS))


def test_gathering_a_whole_policy_does_nothing(tmp_path: Path) -> None:
    policy = Policy(load_policy(save(tmp_path, "llama")).hf)
    before = [id(p) for p in policy.parameters()]
    with gathered(policy):
        assert [id(p) for p in policy.parameters()] == before


@pytest.mark.usefixtures("group")
def test_what_cannot_be_sharded_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="float64 and param_dtype bfloat16 contradict"):
        load_sharded(resolve_model(TINY), "float64", started(param_dtype="bfloat16"))
    path = save(tmp_path, "llama")
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"cannot be loaded: .*header"):
        load_sharded(path, "float32", started())


def test_narrow_weights_make_the_engine_inexact() -> None:
    """Log-probabilities of decoding and of training then differ by bfloat16 rounding, so they are scored again."""
    assert compute_precision(FSDP2Strategy(), "float32", "32-true") == "32-true"
    assert compute_precision(FSDP2Strategy(param_dtype="bfloat16"), "float32", "32-true") == "bf16-true"
    assert compute_precision(tiny_trainer(1, []).strategy, "bfloat16", "32-true") == "bf16-true"
