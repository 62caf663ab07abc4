"""Captured decoding steps against the same steps without: on recorded operations, which is all that a CUDA graph is."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any, cast
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tape import ATEN, CaptureError, Looks, TapeRecorder
from test_scheduler import LONG, PROMPTS, SAMPLES, TOKENIZER, UID, adapted, make_policy, output, plainly, same
from tiny_models import CONTEXT, random_prompts
from torch import Tensor

from lit_rlvr.engines import Generation, InProcessEngine, Sampling, graph_steps, graphs, in_process, sampler
from lit_rlvr.engines.capture import CudaRecorder
from lit_rlvr.engines.decoding import Output, prefill
from lit_rlvr.engines.graph_draws import DrawGraphs
from lit_rlvr.engines.graph_steps import StepGraphs
from lit_rlvr.engines.graphs import bucket, why_not
from lit_rlvr.engines.narrow import narrowed_linears
from lit_rlvr.engines.sampler import draw_named
from lit_rlvr.engines.scheduler import Scheduler
from lit_rlvr.engines.slots import SlotCache, windows
from lit_rlvr.policy import Policy

LAWS = settings(max_examples=10, deadline=None, derandomize=True)
FULL: dict[str, Any] = {"layer_types": ["full_attention"] * 2}
KINDS: dict[str, Callable[[], Policy]] = {
    "qwen3": make_policy,
    "llama": lambda: make_policy("llama"),
    "gpt2": lambda: make_policy("gpt2"),
    "granite": lambda: make_policy("granite"),
    "gemma2": lambda: make_policy("gemma2", **FULL),
    "gemma3": lambda: make_policy("gemma3", **FULL),
    "grouped": lambda: make_policy("llama", num_attention_heads=4, num_key_value_heads=2),
    "adapters": adapted,
    "eager": lambda: make_policy(attn_implementation="eager"),
}


@pytest.fixture(autouse=True)
def no_looks() -> Iterator[None]:
    """Numbers on the CPU are not read either."""
    with pytest.MonkeyPatch.context() as change:
        change.setattr(sampler, "READABLE", ())
        yield


@pytest.fixture
def narrow_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Storage that grows and moves while tiny models decode."""
    monkeypatch.setattr(graphs, "SPARE", 16)


class Recorders:
    """Makes recorders, and keeps them."""

    def __init__(self) -> None:
        self.made: list[TapeRecorder] = []

    def __call__(self) -> TapeRecorder:
        """One more."""
        self.made.append(TapeRecorder())
        return self.made[-1]


@torch.no_grad()
def schedule(
    policy: Policy, recorder: Any, max_rows: int = 64, out: Output | None = None
) -> tuple[Generation, Scheduler]:
    """Three responses to each prompt, and what decoded them."""
    out = out or output(policy, LONG)
    scheduler = Scheduler(policy, windows(policy.hf.config) or [], PROMPTS, SAMPLES, max_rows, out, recorder)
    scheduler.run()
    return out.finish(), scheduler


@pytest.mark.usefixtures("narrow_storage")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("max_rows", [3, 64])
def test_the_same_as_without_graphs(kind: str, max_rows: int) -> None:
    """Ragged prompts, rows that end and begin, storage that grows and moves."""
    policy, recorders = KINDS[kind](), Recorders()
    wanted, _ = schedule(policy, None, max_rows)
    with patch.object(Scheduler, "_forward", autospec=True, side_effect=Scheduler._forward) as without:
        got, scheduler = schedule(policy, recorders, max_rows)
    same(got, wanted)
    assert without.call_count == 1
    assert scheduler.graphs is not None
    assert isinstance(scheduler.out.drawer, DrawGraphs)
    widths = len(recorders.made) - 1  # draws have the other
    assert widths > 1


@LAWS
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=8),
    samples=st.integers(1, 4),
    max_rows=st.integers(1, 12),
    patience=st.sampled_from([0, 1, 8]),
    spare=st.sampled_from([1, 16, 40]),
)
def test_any_rows_in_any_order(lengths: list[int], samples: int, max_rows: int, patience: int, spare: int) -> None:
    """Whatever is decoded together, in float64."""
    policy, prompts = make_policy().double(), random_prompts(lengths)
    uid = torch.tensor([(1, draw, sample) for draw in range(len(prompts)) for sample in range(samples)])
    with pytest.MonkeyPatch.context() as change:
        change.setattr(graphs, "SPARE", spare)
        change.setattr(graphs, "PATIENCE", patience)
        found = []
        for recorder in (None, TapeRecorder):
            out = Output(TOKENIZER, in_process.end_tokens(policy, TOKENIZER), uid, Sampling(max_new_tokens=30), 3)
            with torch.no_grad():
                Scheduler(policy, [None, None], prompts, samples, max_rows, out, recorder).run()
            found.append(out.finish())
    same(found[1], found[0])


def test_bfloat16_is_as_exact_as_without() -> None:
    """Against float64 of the same weights, on the same tokens: the errors of one step are of one size."""
    policy, whole = make_policy().bfloat16(), make_policy().bfloat16().double()
    errors = []
    for one in (StepGraphs.next_logits, None):
        taken = step(policy, one is not None)
        errors.append((taken.double() - step(whole, False)).norm())
    assert 0 < errors[0] < 1.5 * errors[1]


@torch.no_grad()
def step(policy: Policy, captured: bool, columns: int = 5, recorder: Any = TapeRecorder) -> Tensor:
    """Logits of the last of a few steps on given tokens, after ragged prompts."""
    token = torch.arange(2, 2 + len(PROMPTS))
    logits, mask, prompts = prefill(policy, PROMPTS)
    cache, position = SlotCache([None, None], len(PROMPTS)), mask.sum(-1)
    cache.admit(prompts, torch.arange(len(PROMPTS)), mask.shape[1])
    steps = StepGraphs(policy, cache, logits, recorder)
    for _ in range(columns):
        if captured:
            logits = steps.next_logits(token, position)
        else:
            longest = int(position.max())
            seen = torch.arange(longest + 1) >= (longest - position)[:, None]
            logits = policy.next_logits(token[:, None], seen, position[:, None], cache)
        position = position + 1
    return logits.clone()


@pytest.mark.usefixtures("narrow_storage")
def test_rows_out_of_use_stay_finite_and_touch_nothing() -> None:
    """A graph of 4 rows for 3, after a move to the left of what was left behind: slots in use keep what they hold."""
    policy = make_policy()
    with torch.no_grad():
        logits, _, prompts = prefill(policy, [PROMPTS[2]] * 4)
        cache = SlotCache([None, None], 4)
        cache.admit(prompts, torch.arange(4), 9)
        steps = StepGraphs(policy, cache, logits, TapeRecorder)
        token, position = torch.tensor([5, 6, 7, 8]), torch.full((4,), 9)
        steps.next_logits(token, position)
        steps.position.fill_(CONTEXT - 1)  # as far back as any row could have reached
        steps.token.fill_(3)
        cache.keep(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), 3, 10)
        before = [[storage[:3, :, :10].clone() for storage in layer.storage] for layer in cache.slots]
        steps.next_logits(token[:3], position[:3] + 1)
    assert list(steps.graphs.replays) == [4]
    for layer, kept in zip(cache.slots, before, strict=True):
        for storage, old in zip(layer.storage, kept, strict=True):
            assert torch.equal(storage[:3, :, :10], old)
            assert storage.isfinite().all()
            assert storage[3, :, 10].any()


def test_few_captures() -> None:
    """One per number of rows and width; a quick descent is decoded with what is there."""
    _, scheduler = schedule(make_policy(), TapeRecorder)
    assert scheduler.graphs is not None
    assert scheduler.graphs.width == 64  # 9 + 40, then a multiple of 16
    assert set(scheduler.graphs.graphs.wanted) > set(scheduler.graphs.graphs.replays)
    assert scheduler.graphs.graphs.captures <= len({bucket(rows, 21) for rows in range(1, 22)}) // 2


@pytest.mark.usefixtures("narrow_storage")
def test_each_width_has_memory_of_its_own() -> None:
    """CUDA refuses a pool all of whose graphs are gone; and a graph of narrower storage would read what is freed."""
    recorders = Recorders()
    _, scheduler = schedule(make_policy(), recorders, 3)
    assert scheduler.graphs is not None
    steps, draws = scheduler.graphs.graphs, cast(DrawGraphs, scheduler.out.drawer).graphs
    assert steps.captures + draws.captures == sum(len(recorder.tapes) for recorder in recorders.made)
    assert recorders.made[-1] is steps.recorder
    assert len(steps.recorder.tapes) == len(steps.replays) < steps.captures


def unmasked(self: StepGraphs, rows: int) -> None:
    """A step that looks at columns that hold nothing."""
    cache: Any = graph_steps.Cache(
        layers=[graph_steps._WholeLayer(layer, rows, self.column) for layer in self.cache.slots]
    )
    self.logits[:rows].copy_(self.policy.next_logits(self.token[:rows], None, self.position[:rows], cache))


def test_a_model_that_takes_the_mask_in_another_way(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Is decoded without graphs from the second step on, and says so."""
    policy = make_policy()
    wanted, _ = schedule(policy, None)
    monkeypatch.setattr(StepGraphs, "_step", unmasked)
    got, scheduler = schedule(policy, TapeRecorder)
    same(got, wanted)
    assert scheduler.graphs is None
    assert "decoded without them" in caplog.text


def test_the_engine_takes_graphs_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """On what it takes for a CUDA device, unless told not to; the weights of each rollout are its own."""
    policy, recorders = make_policy(), Recorders()
    monkeypatch.setattr(in_process, "CudaRecorder", lambda device: recorders())
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


@pytest.mark.parametrize("more", [{}, {"temperature": 0.7}, {"temperature": 0.0}, {"top_k": 5}, {"top_p": 0.8}])
def test_draws_of_every_kind(more: dict[str, Any]) -> None:
    """Fewer rows than the graph has, logits that are there already or are not, and other names each time."""
    generator = torch.Generator().manual_seed(0)
    sampling, memory = Sampling(**more), torch.zeros(6, 300)
    draws = DrawGraphs(memory, sampling, 9, TapeRecorder)
    for rows in (6, 3, 5, 1):
        logits, name = torch.randn(rows, 300, generator=generator), torch.randint(99, (rows, 4), generator=generator)
        wanted = draw_named(logits, name, sampling, 9)
        for given_as in (logits, memory[:rows].copy_(logits)):
            assert all(torch.equal(*pair) for pair in zip(draws(given_as, name, sampling, 9), wanted, strict=True))
    assert draws.graphs.captures == 1


def on_cuda(policy: Policy) -> Policy:
    """The policy as it would be on a GPU, as far as names go."""
    policy.placed = torch.device("cuda")
    return policy


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
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

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


@pytest.mark.parametrize(
    ("rows", "wanted"), [(1, 1), (2, 2), (3, 3), (5, 6), (7, 8), (97, 128), (130, 192), (200, 250)]
)
def test_numbers_of_rows(rows: int, wanted: int) -> None:
    """Less than a third more than there are, and never more than slots."""
    assert bucket(rows, 250) == wanted


class TestTape:
    """The recorder of these tests refuses and reveals what CUDA graphs would not do."""

    def record(self, run: Callable[[], Any]) -> Callable[[], None]:
        return TapeRecorder().record(run)

    @pytest.mark.parametrize(
        "run",
        [
            lambda x, out: out.fill_(x.sum().item()),
            lambda x, out: out.fill_(1) if x.sum() > 0 else None,
            lambda x, out: out.copy_(x[x > 0].sum()),
            lambda x, out: out.copy_(x.nonzero().sum()),
            lambda x, out: out.copy_(torch.tensor(2.0)),
            lambda x, out: out.copy_(torch.unique(x).sum()),
        ],
    )
    def test_refuses(self, run: Callable[[Tensor, Tensor], Any]) -> None:
        with pytest.raises(CaptureError):
            self.record(lambda: run(torch.ones(3), torch.zeros(())))

    def test_reads_memory_and_not_numbers(self) -> None:
        x, out, number = torch.ones(3), torch.zeros(3), 1
        replay = self.record(lambda: out.copy_(torch.cat([x[:1] * 2, x[1:]]) + number))
        x[:], number = 5, 100
        replay()
        assert out.tolist() == [11, 6, 6]

    def test_does_not_see_what_takes_a_tensors_place(self) -> None:
        holder, out = {"x": torch.ones(2)}, torch.zeros(2)
        replay = self.record(lambda: out.copy_(holder["x"] * 2))
        holder["x"] = torch.full((2,), 7.0)
        replay()
        assert out.tolist() == [2, 2]

    def test_what_lies_between_is_gone(self) -> None:
        kept: list[Tensor] = []
        x = torch.ones(2)
        self.record(lambda: kept.append(x + 1))()
        assert kept[-1].isnan().all()


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@needs_cuda
@pytest.mark.usefixtures("narrow_storage")
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_cuda_device(kind: str) -> None:
    """The same tokens with graphs and without, in float32; and more than one capture."""
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
    recorder = in_process.partial(CudaRecorder, policy.device)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            schedule(policy, recorder, out=out)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [warning for warning in caught if "synchronizing" in str(warning.message)]
    assert len(waits) <= 2 * out.steps + 40
