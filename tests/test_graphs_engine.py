"""Where the engine captures its steps, how often it waits for a device, and graphs on a real one."""

from __future__ import annotations

import warnings
from functools import partial

import pytest
import torch
from captured import KINDS, Recorders, on_cuda, schedule
from tape import Looks, TapeRecorder
from test_scheduler import LONG, PROMPTS, SAMPLES, TOKENIZER, UID, make_policy, output, plainly, same
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lit_rlvr.engines import InProcessEngine, graphs, in_process
from lit_rlvr.engines.capture import CudaRecorder
from lit_rlvr.engines.decoding import Output
from lit_rlvr.engines.graphs import why_not
from lit_rlvr.engines.narrow import narrowed_linears
from lit_rlvr.engines.scheduler import Scheduler

pytestmark = pytest.mark.usefixtures("unread")


def test_the_engine_takes_graphs_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """On what it takes for a CUDA device, unless told not to; the weights of each rollout are its own."""
    policy, recorders = make_policy(), Recorders()
    monkeypatch.setattr(in_process, "CudaRecorder", lambda device, required, purpose: recorders())
    monkeypatch.setattr(in_process, "why_not", lambda policy, windows: None)
    monkeypatch.setattr(in_process, "packed_linears", lambda policy: narrowed_linears(policy, policy.device))
    engine = InProcessEngine(6)
    for _ in range(2):
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.mul_(1.1)
        recorders.made.clear()
        same(engine.generate(policy, TOKENIZER, PROMPTS, UID, LONG, 7), plainly(policy, LONG))
        assert sum(recorder.replays for recorder in recorders.made) > 40
    recorders.made.clear()
    same(
        InProcessEngine(6, graphs=False).generate(policy, TOKENIZER, PROMPTS, UID, LONG, 7),
        plainly(policy, LONG),
    )
    assert not recorders.made


def test_why_steps_are_not_captured() -> None:
    """Half a sentence for each reason; none for plain models on CUDA."""
    full: list[int | None] = [None, None]
    assert why_not(on_cuda(make_policy()), full) is None
    assert why_not(on_cuda(make_policy("gpt2")), full) is None
    assert why_not(make_policy(), full) == "the policy is on cpu, which has no CUDA graphs"
    assert why_not(on_cuda(make_policy()), None) == "its layers keep more than keys and values"
    assert why_not(on_cuda(make_policy("gemma2")), [4, None]) == "its layers attend within a sliding window"
    for kind in ("dynamic", "longrope"):
        policy = on_cuda(make_policy("llama"))
        policy.hf.config.rope_parameters = {"full_attention": {"rope_type": kind}}
        assert why_not(policy, full) == "its rotary embedding depends on the longest row"
    policy = on_cuda(make_policy())
    policy.hf.config._attn_implementation = "flash_attention_2"
    assert why_not(policy, full) == "its attention is flash_attention_2, not sdpa or eager"
    policy = on_cuda(make_policy())
    policy.hf._can_compile_fullgraph = False
    assert why_not(policy, full) == "what Qwen3ForCausalLM computes depends on values"


@pytest.mark.usefixtures("group")
def test_sharded_policies_are_not_captured() -> None:
    """Their forward passes have hooks that gather weights."""
    policy = make_policy()
    fully_shard(policy, mesh=init_device_mesh("cpu", (1,)))
    assert why_not(on_cuda(policy), [None, None]) == "its weights are spread over devices"


def test_what_is_demanded_and_impossible_is_refused() -> None:
    """In one sentence; null and false are silent."""
    policy = make_policy()
    with pytest.raises(ValueError, match=r"engine.graphs: true is not possible: the policy is on cpu.*; leave it null"):
        InProcessEngine(graphs=True).generate(policy, TOKENIZER, PROMPTS, UID, LONG, 7)
    for graphs_ in (None, False):
        assert InProcessEngine(graphs=graphs_)._recorder(policy, [None, None]) is None
    assert InProcessEngine(graphs=False)._recorder(on_cuda(policy), [None, None]) is None
    assert InProcessEngine()._recorder(on_cuda(policy), [None, None]) is not None


def test_one_read_per_step() -> None:
    """A step with graphs waits for the device once, to know which rows are done, and makes indices if some are."""
    policy = make_policy()
    out = output(policy, LONG)
    scheduler = Scheduler(policy, [None, None], PROMPTS, SAMPLES, 64, out, TapeRecorder)
    with torch.no_grad():
        token, done = out.draw(scheduler._admit(None), scheduler.row)  # type: ignore[arg-type]
        token = scheduler._drop(token, done)
        scheduler._advance(token)  # takes graphs
        stayed = left = 0
        while scheduler.lengths and stayed + left < 30:
            before = len(scheduler.lengths)
            with Looks() as looks:
                token, done = out.draw(scheduler._advance(token), scheduler.row)
                token = scheduler._drop(token, done)
            if len(scheduler.lengths) < before:
                assert looks.found == ["tolist", "tensor"]
                left += 1
            else:
                assert looks.found == ["tolist"]
                stayed += 1
    assert stayed
    assert left


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@needs_cuda
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_cuda_device(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same tokens with graphs and without, in float32; and more than one capture."""
    monkeypatch.setattr(graphs, "SPARE", 16)
    policy, uid = KINDS[kind]().cuda(), UID.cuda()
    found = [
        InProcessEngine(6, graphs=captured).generate(policy, TOKENIZER, PROMPTS, uid, LONG, 7)
        for captured in (False, True)
    ]
    same(found[1], found[0])


@needs_cuda
def test_waits_on_a_cuda_device() -> None:
    """CUDA's own count of waits: about one per step, but for what begins and ends a rollout."""
    policy = make_policy().cuda()
    ends = in_process.end_tokens(policy, TOKENIZER)
    out = Output(TOKENIZER, ends, UID.cuda(), LONG, 7)
    recorder = partial(CudaRecorder, policy.device, True)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            schedule(policy, recorder, out=out)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [warning for warning in caught if "synchronizing" in str(warning.message)]
    assert len(waits) <= 2 * out.steps + 40
