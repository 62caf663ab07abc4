"""Attention over a pack part by part: masks, and the blocks of queries that take them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_layout import Largest, check, choose, ragged
from test_varlen import heads, replaced
from tiny_models import ROPE
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from lit_rlvr import segments
from lit_rlvr.layout import choose_layout
from lit_rlvr.packing import pack_rows
from lit_rlvr.policy import Policy
from lit_rlvr.segments import attend, blocks

CPU = torch.device("cpu")
group = st.tuples(st.integers(1, 9), st.lists(st.integers(0, 25), min_size=1, max_size=3))
windows = st.none() | st.integers(1, 12)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(st.integers(1, 9), st.lists(st.integers(0, 25), min_size=1, max_size=3)), min_size=1, max_size=3
    ),
    st.integers(1, 9),
    windows,
)
def test_equal_to_one_call(groups: list[tuple[int, list[int]]], block: int, window: int | None) -> None:
    """Outputs and gradients in float64, against loops over the sequences of the pack."""
    torch.manual_seed(0)
    rows = [(number, prompt, answer) for number, (prompt, answers) in enumerate(groups) for answer in answers]
    asked, answers = ([torch.zeros(row[i], dtype=torch.int64) for row in rows] for i in (1, 2))
    ids, _, _, pack = pack_rows(asked, answers, [number for number, _, _ in rows])
    inputs = [heads(number, ids.shape[1], 8, torch.float64, CPU) for number in (4, 2, 2)]
    module: Any = nn.Module()
    module.num_key_value_groups = 2
    weight = torch.randn(1, ids.shape[1], 4, 8, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segments, "BLOCK", block)
        found, _ = attend(module, *inputs, None, pack, window, scaling=0.3)
    with replaced():
        wanted, _ = attend(module, *inputs, None, pack, window, scaling=0.3)
    torch.testing.assert_close(found, wanted)
    gradients = [torch.autograd.grad(attended, inputs, weight) for attended in (found, wanted)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("kind", ["mistral", "gemma3_text", "qwen3"])
def test_models_in_blocks(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Loss and gradients of whole rows, with windows of 4 in all, some and no layers."""
    monkeypatch.setattr(segments, "BLOCK", 3)
    more = {"gemma3_text": {"layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 8}}
    window = {} if kind == "qwen3" else {"sliding_window": 4}
    config = AutoConfig.for_model(kind, **ROPE, **window, **more.get(kind, {}))
    policy = Policy(AutoModelForCausalLM.from_config(config).double().eval())
    policy.layout = choose_layout(policy.hf, "shared")
    rollout = ragged([3, 1, 4], 5, longest=30)
    for layout in ("packed", "shared"):
        check(policy, rollout, choose(rollout, 0.5, 5), layout, exact=False)


@pytest.mark.parametrize(("prompt", "window"), [(0, None), (0, 40), (7, None), (7, 47), (7, 48), (7, 5), (0, 1)])
def test_blocks_by_law(monkeypatch: pytest.MonkeyPatch, prompt: int, window: int | None) -> None:
    """Every query once, and with a mask where causal attention alone is not right; few keys in a window."""
    monkeypatch.setattr(segments, "BLOCK", 16)
    _, _, _, pack = pack_rows([torch.zeros(1, dtype=torch.int64)], [torch.zeros(0, dtype=torch.int64)], [0])
    query, key = torch.zeros(1, 2, 41, 8), torch.zeros(1, 1, prompt + 41, 8)
    found = list(blocks(pack, query, key, window))
    queries = [i for rows, _, _ in found for i in range(41)[rows]]
    assert queries == list(range(41))
    if not prompt and window is None:
        assert [mask for _, _, mask in found] == [None]
        return
    for rows, keys, mask in found:
        assert mask is not None
        seen = torch.full((41, prompt + 41), -torch.inf)
        seen[rows, keys] = mask[0, 0]
        for i in range(41)[rows]:
            most = prompt + i + 1
            least = 0 if window is None else max(0, most - window)
            assert seen[i].isfinite().nonzero().flatten().tolist() == list(range(least, most))
        if window is not None:
            assert mask.untyped_storage().nbytes() <= 4 * 16 * (window + 15)
    assert len({mask.untyped_storage().data_ptr() for _, _, mask in found if mask is not None}) == 1


def test_no_mask_grows_with_the_square_of_a_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long row in a window, and a long response to a shared prompt: the largest tensor is in proportion to them."""
    monkeypatch.setattr(segments, "BLOCK", 16)
    tokens = [torch.zeros(length, dtype=torch.int64) for length in (5, 5, 5, 1000, 1, 1000)]
    ids, _, _, pack = pack_rows(tokens[:3], tokens[3:], [0, 0, 1])
    inputs = [heads(1, ids.shape[1], 8, torch.float32, CPU) for _ in range(3)]
    for window in (None, 8):
        with Largest() as largest:
            attended, _ = attend(nn.Module(), *inputs, None, pack, window)
            attended.sum().backward()
        assert largest.elements <= 16 * ids.shape[1]
