"""Decoding on a CPU over the whole storage: the same attention, and the same tokens as plain decoding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_scheduler import LONG, TOKENIZER, generate, make_policy, plainly, same
from tiny_models import build
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.testing import assert_close
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lit_rlvr.engines import Sampling, whole
from lit_rlvr.engines.decoding import Output
from lit_rlvr.engines.in_process import end_tokens
from lit_rlvr.engines.scheduler import Scheduler
from lit_rlvr.engines.slots import windows
from lit_rlvr.engines.unrecorded import unrecorded
from lit_rlvr.grouped import attend_one, serves_one
from lit_rlvr.layout import choose_layout
from lit_rlvr.policy import Policy

FULL = ("qwen3", "llama", "gpt2", "granite")
"""Families without a sliding window, and with an attention that can be exchanged."""


def shared(family: str, dtype: torch.dtype = torch.float32) -> Policy:
    """A policy that shares prompts, as the models do that are trained by default."""
    policy = make_policy(family).to(dtype)
    policy.layout = choose_layout(policy.hf, "shared")
    return policy


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each decoding step, whether it was taken over the whole storage."""
    steps: list[bool] = []
    original = whole.next_logits

    def counted(*args: Any) -> Tensor | None:
        logits = original(*args)
        steps.append(logits is not None)
        return logits

    monkeypatch.setattr(whole, "next_logits", counted)
    return steps


@pytest.mark.parametrize(("heads", "key_heads"), [(6, 3), (4, 4), (8, 1)])
@pytest.mark.parametrize("masked", ["no", "all alike", "by row"])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_one_query_attends_as_transformers_does(heads: int, key_heads: int, masked: str, scaling: float | None) -> None:
    """In float64, over a view of a larger storage."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(5, heads, 1, 8, generator=generator, dtype=torch.float64)
    key, value = (torch.randn(7, key_heads, 20, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    key, value = key[:5, :, 3:16], value[:5, :, 3:16]
    mask = None
    if masked != "no":
        seen = torch.rand(5 if masked == "by row" else 1, 1, 1, 13, generator=generator) < 0.5
        seen[..., 4] = True
        mask = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -torch.inf)
    module = nn.Module()
    module.num_key_value_groups = heads // key_heads  # type: ignore[assignment]
    wanted, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=scaling)
    assert serves_one(query, key, mask, {"scaling": scaling, "dropout": 0.0})
    assert_close(attend_one(query, key, value, mask, scaling), wanted)


def test_what_one_query_does_not_serve() -> None:
    """More queries, narrow types, masks of truth values or by head, and what else may be added to scores."""
    query, key, mask = torch.zeros(2, 4, 1, 8), torch.zeros(2, 2, 5, 8), torch.zeros(2, 1, 1, 5)
    assert serves_one(query, key, mask, {})
    assert not serves_one(torch.zeros(2, 4, 3, 8), key, mask, {})
    assert not serves_one(query.bfloat16(), key.bfloat16(), mask.bfloat16(), {})
    assert not serves_one(query, key, mask == 0, {})
    assert not serves_one(query, key, torch.zeros(2, 4, 1, 5), {})
    for more in ({"position_bias": mask}, {"softcap": 3.0}, {"dropout": 0.1}, {"s_aux": mask}):
        assert not serves_one(query, key, mask, more)


@pytest.mark.parametrize("family", FULL)
@pytest.mark.parametrize("max_rows", [1, 2, 7, 64])
def test_the_same_as_plain_decoding(family: str, max_rows: int, taken: list[bool]) -> None:
    """Rows that leave and join, so that a row sees less than is in use."""
    for dtype in (torch.float32, torch.float64):
        policy = shared(family, dtype)
        same(generate(policy, LONG, max_rows), plainly(make_policy(family).to(dtype), LONG))
    assert sum(taken) > 40


def test_a_storage_that_is_mostly_empty_is_not_read_whole(taken: list[bool]) -> None:
    """A long prompt whose response ends leaves its columns to short rows."""
    prompts = [[2 + i % 40 for i in range(44)], [3, 4], [5, 6]]
    policy, sampling = shared("qwen3"), Sampling(max_new_tokens=20)
    uid = torch.tensor([(0, draw, 0) for draw in range(3)])
    out = Output(TOKENIZER, end_tokens(policy, TOKENIZER), uid, sampling, 3)
    with torch.no_grad():
        Scheduler(policy, [None, None], prompts, 1, 2, out).run()
    assert {True, False} == set(taken)
    lengths = out.finish().mask.sum(-1).tolist()
    alone = [
        generate_one(policy, prompt, uid[row : row + 1], sampling)[: lengths[row]] for row, prompt in enumerate(prompts)
    ]
    assert alone == [row[:n] for row, n in zip(out.ids.tolist(), lengths, strict=True)]


def generate_one(policy: Policy, prompt: list[int], uid: Tensor, sampling: Sampling) -> list[int]:
    """The response to one prompt, decoded alone over the columns in use."""
    out = Output(TOKENIZER, end_tokens(policy, TOKENIZER), uid, sampling, 3)
    scheduler = Scheduler(policy, [None, None], [prompt], 1, 1, out)
    scheduler.whole = False
    with torch.no_grad():
        scheduler.run()
    return [int(token) for token in out.finish().ids[0]]


def test_where_the_whole_storage_is_read() -> None:
    """Not with windows, under autocast, in bfloat16, or with an attention that is not ours."""
    policy = shared("qwen3")
    assert whole.reads_whole(policy, [None, None])
    assert not whole.reads_whole(policy, [4, None])
    assert not whole.reads_whole(make_policy("qwen3"), [None, None])
    assert not whole.reads_whole(shared("qwen3", torch.bfloat16), [None, None])
    with torch.autocast("cpu", torch.bfloat16):
        assert not whole.reads_whole(policy, [None, None])
    gemma = shared("gemma3")
    reach = windows(gemma.hf.config)
    assert reach is not None
    assert not whole.reads_whole(gemma, reach)


def test_nothing_is_recorded_while_sampling_and_facts_can_be_learnt_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes out is made of ordinary tensors, and so are the weights afterwards."""
    policy, seen = shared("qwen3"), []
    original = policy.next_logits

    def spied(*args: Any) -> Tensor:
        seen.append(torch.is_inference_mode_enabled())
        return original(*args)

    monkeypatch.setattr(policy, "next_logits", spied)
    out = generate(policy, LONG)
    assert seen
    assert all(seen)
    assert not torch.is_inference_mode_enabled()
    tensors = (out.ids, out.mask, out.logprobs, out.entropies, out.truncated)
    assert not any(t is None or t.is_inference() for t in (*tensors, *policy.parameters(), *policy.buffers()))
    ids, mask = out.ids[:1], out.mask[:1]
    policy.train()
    logprobs, _ = policy(ids, torch.arange(ids.shape[1] - 1), ids[0, 1:])
    ((logprobs - out.logprobs[0, 1:]).exp() * out.logprobs[0, 1:] * mask[0, 1:]).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in policy.parameters())


def test_buffers_that_a_pass_replaces_stay_ordinary() -> None:
    """A dynamic rotary embedding fits its frequencies to the longest row."""
    scaled = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    hf: Any = build("llama", rope_parameters=scaled, max_position_embeddings=8)
    with unrecorded(hf):
        hf(torch.zeros(1, 20, dtype=torch.int64))
    fresh: Any = build("llama")
    frequencies = hf.model.rotary_emb.inv_freq
    assert not frequencies.is_inference()
    assert not torch.equal(frequencies, fresh.model.rotary_emb.inv_freq)


def test_modules_that_are_spread_over_devices_are_left_alone() -> None:
    """The weights that they gather are learnt from later."""

    class Spread(FSDPModule, nn.Linear):
        """A linear layer that says it is sharded."""

        def __new__(cls, *args: Any) -> Any:
            return nn.Linear.__new__(cls)

    with unrecorded(nn.Sequential(Spread(2, 2))):
        assert not torch.is_inference_mode_enabled()
    with unrecorded(nn.Linear(2, 2)):
        assert torch.is_inference_mode_enabled()
