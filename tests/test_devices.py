"""From a micro-batch to its gradients nothing waits for the device: the meta device stands in for a GPU.

It has no numbers, so whatever needs one fails on it: ``float``, ``tolist``, a boolean index, ``nonzero``, ``unique``, a
copy to the CPU. Copies in the other direction are counted if they would wait.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any
from weakref import ref

import pytest
import torch
from lit_rlvr_callbacks import ClipCov, EntropyBonus
from rollouts import full_credit, random_rollout
from runs import TINY
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lit_rlvr import Batch, CreditContext, Sampling
from lit_rlvr.aggregation import TokenMean
from lit_rlvr.critic import Critic, ValueModel, score_values, value_losses
from lit_rlvr.devices import give_back_unused, send
from lit_rlvr.kl import KLPenalty
from lit_rlvr.layout import Layout
from lit_rlvr.learning import backward_but_last, policy_losses
from lit_rlvr.losses import CISPO, GSPO, ClippedSurrogate, PolicyLoss
from lit_rlvr.meter import Meter
from lit_rlvr.minibatch import MiniBatch
from lit_rlvr.models import resolve_model
from lit_rlvr.policy import load_policy
from lit_rlvr.reduce import LocalReduce
from lit_rlvr.scoring import score

META = torch.device("meta")


@pytest.fixture(autouse=True)
def _no_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device does not know of it, not even when it is off."""
    monkeypatch.setattr(torch, "autocast", lambda kind, **options: nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)


class Waiting(TorchDispatchMode):
    """Names the copies from the CPU that would wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        leaves = [arg for arg in args if isinstance(arg, Tensor)]
        moved = isinstance(out, Tensor) and out.device == META and any(t.device.type == "cpu" for t in leaves)
        if moved and "copy" in func.__name__ and not (kwargs or {}).get("non_blocking"):
            self.found.append(f"{func} of {leaves[-1].shape}")
        return out


def mini_batch(**options: Any) -> MiniBatch:
    """Two groups of four responses, of which some tokens do not learn."""
    rollout = random_rollout([4, 4], 8, seed=1)
    rollout = replace(rollout, ref_logprobs=rollout.old_logprobs * 1.1, values=rollout.entropies)
    credit = full_credit(rollout, [1.0, -1.0] * 4)
    weight = credit.weight * (rollout.entropies > 0)
    credit = replace(credit, weight=weight, kl_coef=weight * 0.1)
    return MiniBatch.of(rollout, credit, TokenMean(), LocalReduce(), returns=rollout.entropies, **options)


def module(layout: Layout = "shared", loss: PolicyLoss = ClippedSurrogate(), **more: Any) -> Any:
    """What a step needs of a module, whose policy and critic are on the meta device."""
    path = resolve_model(TINY)
    given: dict[str, Any] = {"kl_loss": None, "chain": [], "separable": not loss.whole_responses, **more}
    return SimpleNamespace(
        policy=load_policy(path, empty=True, layout=layout),
        critic=ValueModel(path, "float32", layout=layout, empty=True),
        critic_settings=Critic(),
        trainer=SimpleNamespace(strategy=None),
        batch=Batch(micro_tokens=15),
        sampling=Sampling(temperature=0.7),
        device=META,
        reduce=LocalReduce(),
        loss=loss,
        ctx=CreditContext(),
        **given,
    )


CASES: dict[str, dict[str, Any]] = {
    "padded": {"layout": "padded"},
    "packed": {"layout": "packed"},
    "shared": {},
    "dual clip": {"loss": ClippedSurrogate(dual_clip=3.0)},
    "cispo": {"loss": CISPO()},
    "gspo": {"loss": GSPO()},
    "terms": {"kl_loss": KLPenalty(0.1), "chain": [EntropyBonus(0.1)]},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("own_old", [True, False])
def test_nothing_waits_for_the_device(case: str, own_old: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward pass of policy and critic, and what is measured of them.

    Only with padded rows, which have no positions of ours, transformers looks at positions once in each pass.
    """
    looks: list[Tensor] = []
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", looks.append)
    passes: list[Any] = []
    ours, mini, meter = module(**CASES[case]), mini_batch(own_old=own_old, engine_old=own_old), Meter()
    for model in (ours.policy, ours.critic):
        model.register_forward_hook(lambda *_: passes.append(_))
    with Waiting() as waiting:
        backward_but_last(policy_losses(ours, mini, meter)).backward()
        backward_but_last(value_losses(ours, mini, meter)).backward()
    assert waiting.found == []
    assert len(looks) == (len(passes) if case == "padded" else 0)
    assert len(passes) > 2
    assert all(p.grad is not None for model in (ours.policy, ours.critic) for p in model.parameters())
    with pytest.raises(NotImplementedError, match="meta"):  # the numbers themselves are fetched at the end
        meter.read(LocalReduce())


def test_the_stand_in_notices_what_waits() -> None:
    there = torch.zeros(3, device=META)
    for wait in (float, lambda t: t[t > 0], torch.nonzero, torch.unique, lambda t: t.cpu(), lambda t: t.tolist()):
        with pytest.raises((NotImplementedError, RuntimeError)):
            wait(there.sum() if wait is float else there)
    with Waiting() as waiting:
        send(torch.ones(2), META)
        there.add(1.0)
        torch.ones(3).to(META)
    assert waiting.found == ["aten._to_copy.default of torch.Size([3])"]


def test_callbacks_that_look_at_a_micro_batch_are_waited_for() -> None:
    """They see it on the CPU, like everything that a callback sees."""
    ours = module(chain=[ClipCov(0.1, scope="micro_batch")], separable=False)
    with pytest.raises(NotImplementedError, match="meta"):
        backward_but_last(policy_losses(ours, mini_batch(own_old=True), Meter()))


@pytest.mark.parametrize("kind", ["policy", "critic"])
def test_scores_are_fetched_when_all_micro_batches_have_been_asked_for(kind: str) -> None:
    ours, rollout = module(), mini_batch().rollout
    seen: list[int] = []
    model = getattr(ours, kind)
    model.register_forward_hook(lambda module, given, out: seen.append(given[0].numel()))
    scored = partial(score, temperature=1.0) if kind == "policy" else partial(score_values, device=META)
    with Waiting() as waiting, pytest.raises(NotImplementedError, match="meta"):
        scored(model, rollout, budget=15, reduce=LocalReduce())
    assert len(seen) > 2
    assert sum(seen) >= int(rollout.response_mask.sum()) - len(rollout)
    assert waiting.found == []


def test_unused_memory_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of tensors in a reference cycle too; a CPU has none."""
    kept: list[Any] = [torch.ones(1)]
    kept.append(kept)
    gone, asked = ref(kept[0]), list[bool]()
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: asked.append(gone() is None))
    del kept
    give_back_unused(torch.device("cpu"))
    assert asked == []
    give_back_unused(torch.device("cuda", 0))
    assert asked == [True]
