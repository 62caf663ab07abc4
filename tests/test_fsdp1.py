"""The first FSDP, in one process: what it does to what the policy is given, and what is refused under it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from command_line import CONFIGS, QUICKSTART, cli
from lightning.pytorch.strategies import FSDPStrategy
from runs import TINY, tiny_module, train
from test_sharding import INPUTS, Facts
from tiny_models import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel

from lit_rlvr.checks import check_first_fsdp
from lit_rlvr.critic import ValueModel
from lit_rlvr.engines.vllm_server import VLLMServerEngine
from lit_rlvr.fsdp1 import FSDP1Strategy, wrap
from lit_rlvr.lora import LoRA
from lit_rlvr.models import resolve_model
from lit_rlvr.optimizing import clip_apart, gradient_norms
from lit_rlvr.policy import load_policy
from lit_rlvr.reduce import LocalReduce
from lit_rlvr.sharding import compute_precision, gathered, whole_weights


class AsItIs(FSDPStrategy):
    """Lightning's own: it would refuse a CPU before we can, if its class were exactly this."""


def started(**options: Any) -> FSDP1Strategy:
    """A strategy with one CPU device, which only a test gets: then nothing is spread, but everything is wrapped."""
    strategy = FSDP1Strategy(**options)
    strategy.parallel_devices = [torch.device("cpu")]
    strategy.mesh = init_device_mesh("cpu", (1,))
    return strategy


@pytest.mark.usefixtures("group")
@pytest.mark.filterwarnings("ignore:FSDP is switching")
def test_facts_keep_their_precision() -> None:
    """The network computes in bfloat16; statistics of the head and the loss's own numbers stay float32."""
    policy = wrap(load_policy(resolve_model(TINY)), started(param_dtype="bfloat16"))
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
@pytest.mark.filterwarnings("ignore:FSDP is switching")
def test_gradients_are_averaged_in_float32() -> None:
    for dtype, wide in (("bfloat16", torch.float32), ("float32", torch.float32), ("float64", torch.float64)):
        policy = wrap(load_policy(resolve_model(TINY), dtype), started())
        parts = FullyShardedDataParallel.fsdp_modules(policy)
        assert len(parts) == 3  # two decoder layers and the policy
        for part in parts:
            assert part.mixed_precision.reduce_dtype == wide
            assert not part.mixed_precision.cast_forward_inputs
            assert not part.mixed_precision.cast_root_forward_inputs


@pytest.mark.usefixtures("group")
@pytest.mark.filterwarnings("ignore:FSDP is switching")
def test_a_critic_keeps_its_head_in_float32() -> None:
    critic = wrap(ValueModel(resolve_model(TINY), "float32"), started(param_dtype="bfloat16"))
    values = critic(*INPUTS[:2])
    assert values.dtype == torch.float32
    assert critic.head.mixed_precision.param_dtype == torch.float32
    assert critic.mixed_precision.param_dtype == torch.bfloat16
    assert critic.narrowed == torch.bfloat16


@pytest.mark.usefixtures("group")
@pytest.mark.filterwarnings("ignore:FSDP is switching")
def test_it_is_the_policy_while_gathered_and_after(tmp_path: Path) -> None:
    """Next-token logits come from inside ``gathered``; afterwards layers run as parts again."""
    path = save(tmp_path, "llama")
    plain, policy = load_policy(path), wrap(load_policy(path), started())
    given = (INPUTS[0], None, torch.arange(4)[None], None)
    with gathered(policy), torch.no_grad():
        torch.testing.assert_close(policy.next_logits(*given), plain.next_logits(*given))
    assert all("forward" not in vars(part) for part in FullyShardedDataParallel.fsdp_modules(policy))
    torch.testing.assert_close(policy(*INPUTS), plain(*INPUTS))
    weights, expected = whole_weights(policy), plain.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], value) for name, value in expected.items())


@pytest.mark.usefixtures("group")
@pytest.mark.filterwarnings("ignore:FSDP is switching")
def test_clipping_is_that_of_the_module() -> None:
    """Norm and clipped gradients are those of FSDP's own ``clip_grad_norm_``, which takes no float64."""
    ours, theirs = (wrap(load_policy(resolve_model(TINY)), started()) for _ in range(2))
    for policy in (ours, theirs):
        policy(*INPUTS, Facts(torch.tensor([0.5, -1.0, 2.0]))).backward()
    optimizer = torch.optim.SGD(ours.parameters(), lr=1.0)
    norms = gradient_norms(optimizer, LocalReduce())
    clip_apart(optimizer, 0.01, LocalReduce())
    assert norms == {"train/grad_norm": pytest.approx(float(theirs.clip_grad_norm_(0.01)), rel=1e-5)}
    for one, two in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad)


@pytest.mark.usefixtures("group")
@pytest.mark.filterwarnings("ignore:FSDP is switching")
def test_contradicting_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match="float64 and param_dtype bfloat16 contradict"):
        wrap(load_policy(resolve_model(TINY), "float64"), started(param_dtype="bfloat16"))


def test_what_does_not_work_is_refused() -> None:
    """By the Trainer's options, or when training begins."""
    with pytest.raises(ValueError, match=r"precision bf16-mixed is not used.*param_dtype"):
        pl.Trainer(accelerator="cpu", strategy=FSDP1Strategy(), devices=2, precision="bf16-mixed", logger=False)
    with pytest.raises(ValueError, match="at least two processes"):
        train(tiny_module(), 1, devices=1, strategy=FSDP1Strategy())


@pytest.mark.usefixtures("group")
def test_other_forms_are_refused() -> None:
    """Adapters, an engine with weights of its own, and Lightning's strategy as it is."""
    with pytest.raises(ValueError, match=r"model.lora does not work under PyTorch's first FSDP.*fsdp.yaml"):
        check_first_fsdp(tiny_module(lora=LoRA()))
    with pytest.raises(ValueError, match="weights cannot be handed to VLLMServerEngine under PyTorch's first FSDP"):
        check_first_fsdp(tiny_module(engine=VLLMServerEngine(addresses=["http://localhost:1"])))
    with pytest.raises(ValueError, match=r"wrap the whole module.*fsdp.yaml, or fsdp1.yaml"):
        train(tiny_module(), 1, devices=1, strategy=AsItIs())


def test_explain_refuses_what_fit_refuses(tmp_path: Path) -> None:
    """Though the strategy is not started on the machine that explains a run."""
    strategy = ("--config", str(CONFIGS / "strategy/fsdp1.yaml"))
    outcome = cli(tmp_path, "explain", *QUICKSTART, *strategy, "--model.lora.r=4")
    assert (outcome.code, "model.lora does not work under PyTorch's first FSDP" in outcome.err) == (2, True)
    outcome = cli(tmp_path, "explain", *QUICKSTART, "--trainer.strategy=fsdp")
    assert (outcome.code, "would wrap the whole module" in outcome.err) == (2, True)


def test_narrow_weights_make_the_engine_inexact() -> None:
    assert compute_precision(FSDP1Strategy(), "float32", "32-true") == "32-true"
    assert compute_precision(FSDP1Strategy(param_dtype="bfloat16"), "float32", "32-true") == "bf16-true"
