"""Attention over a pack in one call: a plain transcription of the kernel's contract stands in for it on a CPU."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_layout import CPU, check, choose, few, float64, ragged
from tiny_models import COMMON, ROPE
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.varlen import varlen_attn
from transformers import AutoConfig, AutoModelForCausalLM

from lit_rlvr import varlen
from lit_rlvr.layout import Reader, choose_layout
from lit_rlvr.packing import pack_rows
from lit_rlvr.policy import Policy
from lit_rlvr.segments import Pack, attend, hidden_states
from lit_rlvr.varlen import Spans, attend_spans, available, dtype_of, kernel, varlen_serves

CUDA = torch.device("cuda")
HALF = (torch.bfloat16, torch.float16)


def sees(queries: int, keys: int, window: tuple[int, int]) -> Tensor:
    """Which keys each query sees [queries, keys].

    Source: flash_attn_varlen_func's documentation; query i attends to keys between i + keys - queries - window[0] and
    i + keys - queries + window[1] inclusive, where a side of -1 has no end.
    """
    seen = torch.ones(queries, keys, dtype=torch.bool)
    for i in range(queries):
        for j in range(keys):
            left = window[0] < 0 or j >= i + keys - queries - window[0]
            seen[i, j] = left and (window[1] < 0 or j <= i + keys - queries + window[1])
    return seen


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """What torch documents of ``varlen_attn``, in float64 and one sequence after the other."""
    heads, size = query.shape[1:]
    assert query.dtype == key.dtype == value.dtype
    assert enable_gqa or key.shape[1] == heads
    assert {t.stride(-1) for t in (query, key, value)} == {1}
    for ends, places, most in ((cu_seq_q, query, max_q), (cu_seq_k, key, max_k)):
        assert ends.dtype == torch.int32
        assert type(most) is int
        assert (ends[0], ends[-1]) == (0, len(places))
        assert ends.diff().max() == most
        assert ends.diff().min() > 0
    head = torch.arange(heads) // (heads // key.shape[1])
    pieces = []
    for i in range(len(cu_seq_q) - 1):
        q = query[cu_seq_q[i] : cu_seq_q[i + 1]].double()
        k, v = (t[cu_seq_k[i] : cu_seq_k[i + 1]].double()[:, head] for t in (key, value))
        scores = torch.einsum("ihd,jhd->hij", q, k) * (size**-0.5 if scale is None else scale)
        scores = scores.masked_fill(~sees(len(q), len(k), window_size), -torch.inf)
        pieces.append(torch.einsum("hij,jhd->ihd", scores.softmax(-1), v))
    return torch.cat(pieces).to(query.dtype)


class Calls:
    """The reference, counting what it is asked for."""

    def __init__(self) -> None:
        self.windows: list[tuple[int, int]] = []
        self.gathered = 0

    def __call__(self, query: Tensor, key: Tensor, *more: Any, **options: Any) -> Tensor:
        self.windows.append(options["window_size"])
        self.gathered += len(key) != len(query)
        return reference(query, key, *more, **options)


@contextmanager
def replaced() -> Iterator[Calls]:
    """The reference in place of the kernel, which then serves a CPU and float64."""
    found = Calls()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(varlen, "available", lambda device: True)
        patch.setattr(varlen, "kernel", lambda: found)
        patch.setattr(varlen, "DTYPES", (torch.float64,))
        yield found


@pytest.fixture
def calls() -> Iterator[Calls]:
    """The kernel's stand-in for a test."""
    with replaced() as found:
        yield found


def test_alignment_that_flash_attention_documents() -> None:
    """Two queries and five keys: the last query sees the last key."""
    assert sees(2, 5, (-1, 0)).int().tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert sees(2, 5, (1, 0)).int().tolist() == [[0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]


@pytest.fixture(scope="module")
def qwen3() -> Policy:
    """Grouped queries and a tied head."""
    return float64("qwen3")


@few
@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.floats(0.1, 1), st.integers(1, 60), st.integers(0, 999))
def test_equal_to_whole_rows(qwen3: Policy, sizes: list[int], share: float, budget: int, seed: int) -> None:
    """Ragged groups, split over micro-batches, any tokens: loss and gradients of all parameters."""
    rollout = ragged(sizes, seed)
    chosen = choose(rollout, share, seed)
    with replaced() as calls:
        check(qwen3, rollout, chosen, "packed", selected=seed % 2 == 0, budget=budget)
        check(qwen3, rollout, chosen, "shared", selected=seed % 2 == 1, budget=budget)
    assert bool(calls.windows) == bool(chosen.any())


@pytest.mark.parametrize(
    ("kind", "more", "windows"),
    [
        ("gpt2", {"n_positions": 64, "n_embd": 16, "n_head": 2, "n_layer": 2}, [(-1, 0), (-1, 0)]),
        ("llama", {}, [(-1, 0), (-1, 0)]),
        ("phi3", {}, [(-1, 0), (-1, 0)]),
        ("granite", {"attention_multiplier": 0.3}, [(-1, 0), (-1, 0)]),
        ("mistral", {"sliding_window": 4}, [(3, 0), (3, 0)]),
        (
            "gemma3_text",
            {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 8},
            [(3, 0), (-1, 0)],
        ),
    ],
)
def test_kinds(calls: Calls, kind: str, more: dict[str, Any], windows: list[tuple[int, int]]) -> None:
    """One call per layer, with the model's own scale and window; long and short ones beside each other."""
    basis = COMMON if kind == "gpt2" else ROPE
    hf = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**basis, **more})).double().eval()
    policy = Policy(hf)
    policy.layout = choose_layout(hf, "shared")
    rollout = ragged([3, 1, 4], 5)
    for layout in ("packed", "shared"):
        calls.windows, calls.gathered = [], 0
        check(policy, rollout, choose(rollout, 0.5, 5), layout, exact=False)
        assert calls.windows == windows
        assert calls.gathered == (len(windows) if layout == "shared" else 0)


def test_gradient_checkpointing(calls: Calls, qwen3: Policy) -> None:
    """Layers that are computed again in the backward pass take the same call again."""
    rollout = ragged([3, 1, 4], 5)
    qwen3.hf.activation_checkpointing_enable()
    qwen3.train()
    calls.windows = []
    try:
        check(qwen3, rollout, choose(rollout, 0.5, 5), "shared")
    finally:
        qwen3.eval()
        qwen3.hf.activation_checkpointing_disable()
    assert len(calls.windows) == 2 * len(qwen3.hf.model.layers)


def prompts_and_responses() -> tuple[Tensor, Pack]:
    """Two responses of 3 and 1 tokens to a prompt of 2, and a row of 3 beside them."""
    rows = [[1, 2, 3, 4, 5], [1, 2, 6], [7, 8, 9]]
    split = [torch.tensor(row[:2]) for row in rows], [torch.tensor(row[2:]) for row in rows]
    ids, _, _, pack = pack_rows(*split, [0, 0, 1])
    return ids, pack


def test_spans_by_hand() -> None:
    """Keys of a response stand behind those of its prompt; the places are those of the pack."""
    ids, pack = prompts_and_responses()
    assert ids.tolist() == [[7, 8, 9, 1, 2, 3, 4, 5, 6]]
    spans = pack.spans
    assert spans.queries.tolist() == [0, 3, 5, 8, 9]
    assert spans.keys.tolist() == [0, 3, 5, 10, 13]
    assert spans.longest == (3, 5)
    assert spans.places is not None
    assert ids[0][spans.places].tolist() == [7, 8, 9, 1, 2, 1, 2, 3, 4, 5, 1, 2, 6]
    assert {spans.queries.dtype, spans.keys.dtype} == {torch.int32}


def test_no_gather_where_no_prompt_is_shared() -> None:
    """Rows on their own, and a prompt whose responses need no place."""
    tokens = [torch.tensor([1, 2]), torch.tensor([3, 4])]
    _, _, _, pack = pack_rows(tokens, tokens, [0, 1])
    assert pack.spans.places is None
    _, _, _, pack = pack_rows([tokens[0], tokens[0]], [tokens[0][:0]] * 2, [0, 0])
    assert (pack.spans.places, pack.spans.keys.tolist(), pack.spans.longest) == (None, [0, 2], (2, 2))


def heads(number: int, total: int, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Random heads [1, number, total, size], laid out as a model's linear layer does."""
    values = torch.randn(1, total, number, size, dtype=torch.float64).to(device, dtype)
    return values.transpose(1, 2).detach().requires_grad_()


def both_ways(
    device: torch.device, dtype: torch.dtype, window: int | None, enabled: Callable[[bool], Any]
) -> list[list[Tensor]]:
    """Output and gradients of a pack: in one call, part by part, and part by part in float64 on the CPU."""
    torch.manual_seed(0)
    asked, answers = (
        [torch.zeros(length, dtype=torch.int64) for length in lengths]
        for lengths in ((40, 40, 40, 5, 5, 130, 1), (33, 7, 120, 1, 64, 20, 90))
    )
    ids, _, _, pack = pack_rows(asked, answers, [0, 0, 0, 1, 1, 2, 3])
    total = ids.shape[1]
    q, k, v = (heads(number, total, 32, dtype, device) for number in (4, 2, 2))
    weight = torch.randn(1, total, 4, 32, dtype=torch.float64).to(device, dtype)
    module: Any = nn.Module()
    module.num_key_value_groups = 2
    found = []
    for fast, where, to in ((True, device, dtype), (False, device, dtype), (False, CPU, torch.float64)):
        enabled(fast)
        inputs = [t.detach().to(where, to).requires_grad_() for t in (q, k, v)]
        attended, _ = attend(module, *inputs, None, pack.to(where), window, scaling=0.3)
        found.append([attended.detach(), *torch.autograd.grad(attended, inputs, weight.to(where, to))])
    return found


@pytest.mark.parametrize("window", [None, 1, 16, 500])
def test_one_call_is_part_by_part(monkeypatch: pytest.MonkeyPatch, window: int | None) -> None:
    """Outputs and gradients in float64, where long and short sequences share prompts of several lengths."""
    monkeypatch.setattr(varlen, "kernel", lambda: reference)
    monkeypatch.setattr(varlen, "DTYPES", (torch.float64,))
    once, parts, _ = both_ways(
        CPU, torch.float64, window, lambda fast: monkeypatch.setattr(varlen, "available", lambda device: fast)
    )
    torch.testing.assert_close(once, parts)


@pytest.mark.skipif(not torch.cuda.is_available() or not available(CUDA), reason="no device with the kernel")
@pytest.mark.parametrize("window", [None, 1, 16, 500])
@pytest.mark.parametrize("dtype", HALF)
def test_the_kernel_is_as_near_to_float64_as_sdpa(dtype: torch.dtype, window: int | None) -> None:
    """On a GPU: outputs and gradients, by the norm of their errors."""
    try:
        once, parts, exact = both_ways(CUDA, dtype, window, torch.backends.cuda.enable_flash_sdp)
    finally:
        torch.backends.cuda.enable_flash_sdp(True)
    for one, part, wanted in zip(once, parts, exact, strict=True):
        error, usual = ((t.double().cpu() - wanted).norm() for t in (one, part))
        # Both round the same inputs; a wrong key anywhere costs several percent of the norm.
        assert error <= 2 * usual + 1e-3 * wanted.norm()


def test_torch_has_the_function_as_it_is_called() -> None:
    """The installed version: names, and shapes and dtypes of outputs and gradients on tensors without data."""
    parameters = inspect.signature(varlen_attn).parameters
    assert list(parameters)[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert set(varlen.CALL) <= set(parameters)
    assert kernel() is varlen_attn
    _, pack = prompts_and_responses()
    with FakeTensorMode(allow_non_fake_inputs=True):
        q, k, v = (torch.empty(9, number, 8, dtype=torch.bfloat16, requires_grad=True) for number in (4, 2, 2))
        for window in (None, 4):
            attended = attend_spans(q, k, v, pack.spans, window, 0.5)
            assert (attended.shape, attended.dtype) == (q.shape, q.dtype)
            for gradient, of in zip(torch.autograd.grad(attended.sum(), (q, k, v)), (q, k, v), strict=True):
                assert (gradient.shape, gradient.dtype) == (of.shape, of.dtype)


@pytest.mark.parametrize("function", [None, lambda query, key, value, is_causal=False: query])
def test_a_torch_without_it(monkeypatch: pytest.MonkeyPatch, function: Any) -> None:
    """Missing, or as it was before it had windows."""
    if function is None:
        monkeypatch.delattr("torch.nn.attention.varlen.varlen_attn")
    else:
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", function)
    assert kernel.__wrapped__() is None


@pytest.mark.parametrize(
    ("capability", "hip", "built", "wanted"),
    [
        ((8, 0), None, True, True),
        ((12, 0), None, True, True),
        ((7, 5), None, True, False),
        ((9, 0), "6.4", True, False),
        ((9, 0), None, False, False),
    ],
)
def test_devices(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], hip: str | None, built: bool, wanted: bool
) -> None:
    """NVIDIA's, from Ampere on, where torch was built with the kernel; a CPU never."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: built)
    assert available.__wrapped__(CUDA) is wanted
    assert not available.__wrapped__(CPU)


@pytest.mark.parametrize(
    ("dtype", "sizes", "options", "wanted"),
    [
        (torch.bfloat16, (64, 64), {"scaling": 0.1, "dropout": 0.0, "use_cache": False, "softcap": None}, True),
        (torch.float16, (256, 256), {"position_ids": torch.zeros(1)}, True),
        (torch.float32, (64, 64), {}, False),
        (torch.float64, (64, 64), {}, False),
        (torch.bfloat16, (20, 20), {}, False),
        (torch.bfloat16, (208, 208), {}, False),
        (torch.bfloat16, (264, 264), {}, False),
        (torch.bfloat16, (64, 32), {}, False),
        (torch.bfloat16, (64, 64), {"dropout": 0.1}, False),
        (torch.bfloat16, (64, 64), {"softcap": 30.0}, False),
        (torch.bfloat16, (64, 64), {"s_aux": torch.zeros(4)}, False),
    ],
)
def test_where_it_serves(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, sizes: tuple[int, int], options: dict[str, Any], wanted: bool
) -> None:
    """By dtype, head size and options; wherever torch's own flash attention is switched off, not."""
    query, value = (torch.zeros(1, 2, 3, size, dtype=dtype) for size in sizes)
    assert not varlen_serves(query, value, options)
    monkeypatch.setattr(varlen, "available", lambda device: True)
    assert varlen_serves(query, value, options) is wanted
    monkeypatch.setattr(torch.backends.cuda, "flash_sdp_enabled", lambda: False)
    assert not varlen_serves(query, value, options)


def test_what_a_model_says_before_it_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sharing a prompt takes a mask on a CPU, and elsewhere by head size, autocast and what a model computes in."""

    def takes_masks(hf: Any, narrowed: torch.dtype | None = None) -> bool:
        return Reader.of(SimpleNamespace(hf=hf, layout="shared", narrowed=narrowed), CPU).masks

    hf = float64("llama").hf.bfloat16()
    wide = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **COMMON, n_embd=24, n_head=2, n_layer=1))
    assert takes_masks(hf)
    monkeypatch.setattr(varlen, "available", lambda device: True)
    assert not takes_masks(hf)
    assert takes_masks(wide.bfloat16())
    assert takes_masks(hf.float())
    assert not takes_masks(hf, torch.bfloat16)
    assert takes_masks(hf, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert not takes_masks(hf)


def test_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries that a model turns by float32 angles, and values that it does not: both reach the kernel in bfloat16."""
    hf = float64("llama").hf.float()
    ids, pack = prompts_and_responses()
    dtypes: list[torch.dtype] = []

    def recorded(query: Tensor, *more: Any, **options: Any) -> Tensor:
        dtypes.append(query.dtype)
        return reference(query, *more, **options)

    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert dtype_of(torch.zeros(1)) == torch.bfloat16
        assert dtype_of(torch.zeros(1, dtype=torch.float64)) == torch.float64
        parts = hidden_states(hf.base_model, ids, pack)
        monkeypatch.setattr(varlen, "available", lambda device: True)
        monkeypatch.setattr(varlen, "kernel", lambda: recorded)
        once = hidden_states(hf.base_model, ids, pack)
    assert dtypes == [torch.bfloat16] * len(hf.model.layers)
    assert once.dtype == parts.dtype
    # Both round to 8 bits, here and there a last bit apart.
    torch.testing.assert_close(once, parts, rtol=2**-6, atol=2**-6 * float(parts.abs().max()))
    assert not varlen_serves(torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8), {})


def test_gradients_of_a_prompt_are_added_in_float32() -> None:
    """A thousand responses that each ask for a hundredth: in bfloat16, additions would stop at 4."""
    spans = Spans.of([(range(0), range(1)), *((range(1), range(i, i + 1)) for i in range(1, 1001))])
    values = torch.zeros(1001, 1, 8, dtype=torch.bfloat16, requires_grad=True)
    assert spans.places is not None
    gather: Any = varlen._Gather.apply
    [gradient] = torch.autograd.grad(gather(values, spans.places).sum() * 0.01, values)
    each = torch.tensor(0.01, dtype=torch.bfloat16)
    assert torch.equal(gradient[0, 0, 0], (1001 * each.double()).bfloat16())
    assert torch.equal(gradient[1:], torch.full_like(gradient[1:], each.item()))
