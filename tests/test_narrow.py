"""Decoding under autocast: what is cast once, and what graphs do not cast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from captured import Recorders, schedule, step
from tape import ATEN
from test_scheduler import adapted, make_policy, same

from lit_rlvr.engines.narrow import narrowed_linears
from lit_rlvr.policy import Policy

pytestmark = pytest.mark.usefixtures("unread")


def wide() -> Policy:
    """A policy whose products are large enough to tell from what else is multiplied."""
    return make_policy("llama", hidden_size=32, intermediate_size=48)


def weights_of(policy: Policy) -> set[int]:
    """Where all matrices lie."""
    return {weight.data_ptr() for weight in policy.parameters() if weight.dim() == 2}


def casts(recorders: Recorders) -> set[int]:
    """Where what graphs cast to bfloat16 lies."""
    return {
        args[0].data_ptr()
        for recorder in recorders.made
        for tape in recorder.tapes
        for func, args, kwargs, _ in tape.steps
        if func.overloadpacket is ATEN._to_copy and kwargs.get("dtype") == torch.bfloat16
    }


@pytest.mark.parametrize("make", [wide, adapted])
def test_autocast_casts_weights_once_per_rollout(make: Callable[[], Policy]) -> None:
    """Trained or frozen; no graph casts any, or keeps one that was cast while it was captured."""
    policy, recorders = make(), Recorders()
    with torch.autocast("cpu", torch.bfloat16):
        wanted, _ = schedule(policy, None)
        with narrowed_linears(policy, policy.device) as layers:
            narrowed, _ = schedule(policy, None)
            schedule(policy, recorders)
    same(narrowed, wanted)
    assert layers == sum(type(module) is torch.nn.Linear for module in policy.modules())
    assert casts(recorders)
    assert not weights_of(policy) & casts(recorders)


def test_captured_under_autocast_without_copies() -> None:
    """What is cast in a graph lies in its own memory: autocast's cache neither gives nor keeps it."""
    policy, recorders = wide(), Recorders()
    with torch.autocast("cpu", torch.bfloat16):
        got = step(policy, True, recorder=recorders)
        assert torch.is_autocast_cache_enabled()
        plain = step(policy, False)
    embedding: Any = policy.hf.get_input_embeddings()
    assert weights_of(policy) - {embedding.weight.data_ptr()} <= casts(recorders)
    # 2^-8 per rounding, of which there are a few in two layers
    assert (got - plain).norm() < 0.05 * plain.norm()


def test_autocast_keeps_what_attention_reads() -> None:
    """Keys that a norm has widened are kept in bfloat16: attention would cast all of them for every token."""
    policy, recorders = make_policy(), Recorders()
    with torch.autocast("cpu", torch.bfloat16):
        _, scheduler = schedule(policy, recorders)
    kept = [storage for layer in scheduler.cache.slots for storage in layer.storage]
    assert {storage.dtype for storage in kept} == {torch.bfloat16}
    assert not {storage.data_ptr() for storage in kept} & casts(recorders)
    assert {storage.dtype for storage in schedule(policy, None)[1].cache.slots[0].storage} == {torch.float32}


def test_no_copies_where_there_is_no_autocast() -> None:
    """And none of what autocast leaves as it is; afterwards layers are what they were."""
    policy = make_policy()
    with narrowed_linears(policy, policy.device) as layers:
        assert layers == 0
    with torch.autocast("cpu", torch.bfloat16), narrowed_linears(policy.double(), policy.device) as layers:
        assert layers == 0
    with torch.autocast("cpu", torch.bfloat16), narrowed_linears(policy.float(), policy.device) as layers:
        assert layers > 0
    assert not any("forward" in module.__dict__ for module in policy.modules())
