"""Records that flow through a run: shape checks, row selection, padding and the order of tokens."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lit_rlvr.tasks.base import Prompt
from lit_rlvr.types import UID_LIMITS, Credit, RolloutBatch, pad_rows


def make_batch(rows: int = 3, prompt: int = 2, length: int = 4, start: int = 0, **changes: Any) -> RolloutBatch:
    """A batch whose every number is different, with rows of decreasing length."""
    number = torch.arange(start, start + rows * length).view(rows, length)
    lengths = torch.tensor([max(1, length - i) for i in range(rows)])
    values: dict[str, Any] = {
        "prompt_ids": torch.arange(rows * prompt).view(rows, prompt) + 500,
        "prompt_mask": torch.ones(rows, prompt, dtype=torch.bool),
        "response_ids": number + 1,
        "response_mask": torch.arange(length) < lengths[:, None],
        "old_logprobs": -number - 0.5,
        "entropies": number + 0.25,
        "rewards": torch.arange(rows) + start + 0.125,
        "correct": torch.ones(rows),
        "group": torch.arange(rows) + start,
        "uid": torch.stack([torch.zeros(rows), torch.arange(rows) + start, torch.full((rows,), 2)], -1).long(),
        "truncated": torch.arange(rows) % 2 == 0,
        "prompts": tuple(Prompt(start + i, f"q{start + i}") for i in range(rows)),
        "texts": tuple(f"t{start + i}" for i in range(rows)),
    }
    return RolloutBatch(**{**values, **changes})


def change(name: str, value: Any) -> RolloutBatch:
    """A good batch with one field changed."""
    changes: dict[str, Any] = {name: value}
    return make_batch(**changes)


def tensors(batch: RolloutBatch) -> dict[str, Tensor]:
    """The batch's tensors by name."""
    return {f.name: v for f in fields(batch) if isinstance(v := getattr(batch, f.name), Tensor)}


@pytest.mark.parametrize("name", sorted(tensors(make_batch(ref_logprobs=torch.zeros(3, 4))).keys() - {"response_ids"}))
def test_wrong_shape_is_named(name: str) -> None:
    """A tensor with one row too many is refused, and the message says which and what was expected."""
    good = tensors(make_batch(ref_logprobs=torch.zeros(3, 4)))[name]
    expected = str(tuple(good.shape)).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(ValueError, match=rf"RolloutBatch\.{name} has shape \(4,.*expected {expected}"):
        change(name, torch.cat([good, good[:1]]))


@pytest.mark.parametrize("name", ["response_mask", "old_logprobs", "entropies", "ref_logprobs"])
def test_wrong_length_is_named(name: str) -> None:
    """The token dimension is checked too."""
    with pytest.raises(ValueError, match=rf"RolloutBatch\.{name} has shape \(3, 5\), expected \(3, 4\)"):
        change(name, torch.zeros(3, 5, dtype=torch.bool))


@pytest.mark.parametrize("name", ["prompt_mask", "response_mask", "truncated"])
def test_masks_must_be_bool(name: str) -> None:
    """An integer mask would select rows 0 and 1 instead of masking."""
    with pytest.raises(ValueError, match=rf"RolloutBatch\.{name} must be a bool tensor, got torch\.int64"):
        change(name, tensors(make_batch())[name].long())


@pytest.mark.parametrize("name", ["prompts", "texts"])
def test_texts_and_prompts_must_be_one_per_row(name: str) -> None:
    """Two entries for three rows are refused, none at all are accepted."""
    with pytest.raises(ValueError, match=rf"RolloutBatch\.{name} has 2 entries for 3 rows"):
        change(name, getattr(make_batch(), name)[:2])
    assert getattr(change(name, ()), name) == ()


def test_batch_is_frozen() -> None:
    """Facts are never edited."""
    with pytest.raises(FrozenInstanceError):
        make_batch().rewards = torch.zeros(3)  # type: ignore[misc]


def test_lengths_count_response_tokens() -> None:
    """Padding does not count."""
    assert make_batch(rows=3, length=4).lengths.tolist() == [4, 3, 2]
    assert len(make_batch(rows=3)) == 3


def test_rows_keeps_tensors_prompts_and_texts_together() -> None:
    """Rows come out in the order of the index, also twice."""
    batch = make_batch(rows=4, ref_logprobs=torch.rand(4, 4))
    index = [2, 0, 2]
    picked = batch.rows(torch.tensor(index))
    for name, tensor in tensors(batch).items():
        assert torch.equal(getattr(picked, name), torch.stack([tensor[i] for i in index])), name
    assert picked.texts == ("t2", "t0", "t2")
    assert [p.index for p in picked.prompts] == index


def test_to_moves_every_tensor_and_nothing_else() -> None:
    """Optional tensors move too; texts stay."""
    moved = make_batch(ref_logprobs=torch.zeros(3, 4)).to("meta")
    assert {name: tensor.device.type for name, tensor in tensors(moved).items()} == dict.fromkeys(
        tensors(make_batch(ref_logprobs=torch.zeros(3, 4))), "meta"
    )
    assert moved.texts == make_batch().texts


def test_concatenate_pads_on_the_right() -> None:
    """Each part's rows are found again in the joined batch, followed by zeros and False."""
    parts = [make_batch(2, 3, 2), make_batch(3, 1, 5, start=50)]
    joined = RolloutBatch.concatenate(parts)
    assert joined.texts == parts[0].texts + parts[1].texts
    assert joined.prompts == parts[0].prompts + parts[1].prompts
    assert joined.ref_logprobs is None
    for name, tensor in tensors(joined).items():
        first = 0
        for part in parts:
            want = tensors(part)[name]
            rows = tensor[first : first + len(part)]
            first += len(part)
            assert tensor.dtype == want.dtype
            if want.dim() == 1:
                assert torch.equal(rows, want), name
            else:
                assert torch.equal(rows[:, : want.shape[1]], want), name
                assert not rows[:, want.shape[1] :].any(), name


def test_concatenate_joins_reference_logprobs() -> None:
    """Present in all parts, they are padded like the others."""
    parts = [make_batch(1, 1, n, ref_logprobs=torch.full((1, n), -float(n))) for n in (1, 2)]
    ref = RolloutBatch.concatenate(parts).ref_logprobs
    assert ref is not None
    assert ref.tolist() == [[-1.0, 0.0], [-2.0, -2.0]]


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_pad_rows_fills_with_zero_in_the_same_dtype(dtype: torch.dtype) -> None:
    """Narrow parts get zeros on the right, one-dimensional ones are only joined."""
    joined = pad_rows([torch.ones(1, 3, dtype=dtype), torch.ones(2, 1, dtype=dtype)])
    assert joined.dtype == dtype
    assert joined.int().tolist() == [[1, 1, 1], [1, 0, 0], [1, 0, 0]]
    assert pad_rows([torch.ones(2, dtype=dtype), torch.zeros(1, dtype=dtype)]).int().tolist() == [1, 1, 0]


@given(
    st.sets(st.tuples(st.integers(0, 2**24 - 1), st.integers(0, 2**15 - 1)), min_size=1, max_size=6),
    st.integers(1, 5),
    st.integers(0, 3),
    st.randoms(use_true_random=False),
)
@settings(max_examples=50, deadline=None, derandomize=True)
def test_token_order_is_unique_and_independent_of_rows_and_padding(
    names: set[tuple[int, int]], length: int, extra: int, random: Any
) -> None:
    """Equal to (position, draw, sample) read as digits; a permutation moves it along; more padding changes nothing."""
    rows = sorted(names)
    random.shuffle(rows)
    uid = torch.tensor([(9, draw, sample) for draw, sample in rows])
    order = make_batch(len(rows), 2, length, uid=uid).token_order()
    wanted = [[(t << 39) | (draw << 15) | sample for t in range(length)] for draw, sample in rows]
    assert order.tolist() == wanted
    assert len(set(order.flatten().tolist())) == len(rows) * length
    permutation = torch.tensor(random.sample(range(len(rows)), len(rows)))
    assert torch.equal(make_batch(len(rows), 2, length, uid=uid[permutation]).token_order(), order[permutation])
    assert torch.equal(make_batch(len(rows), 2, length + extra, uid=uid).token_order()[:, :length], order)


def test_token_order_fits_into_63_bits() -> None:
    """The limits multiply to 2^63, so that the largest name is the largest int64."""
    assert UID_LIMITS["draw"] * UID_LIMITS["sample"] * UID_LIMITS["position"] == 1 << 63
    uid = torch.tensor([[0, UID_LIMITS["draw"] - 1, UID_LIMITS["sample"] - 1]])
    last = int(make_batch(1, 1, 1, uid=uid).token_order()) + ((UID_LIMITS["position"] - 1) << 39)
    assert last == 2**63 - 1


@pytest.mark.parametrize(("name", "column"), [("draw", 1), ("sample", 2)])
def test_token_order_refuses_numbers_beyond_its_limits(name: str, column: int) -> None:
    """A draw or sample that would run into its neighbour's bits is named."""
    uid = torch.zeros(1, 3, dtype=torch.int64)
    uid[0, column] = UID_LIMITS[name]
    with pytest.raises(ValueError, match=f"{name} {UID_LIMITS[name]} is beyond the supported {UID_LIMITS[name] - 1}"):
        make_batch(1, 1, 1, uid=uid).token_order()


def test_token_order_of_no_rows_is_empty() -> None:
    """A rank without rows does not fail."""
    assert make_batch().rows(torch.zeros(0, dtype=torch.int64)).token_order().shape == (0, 4)


def test_credit_needs_one_shape() -> None:
    """The message lists all three."""
    with pytest.raises(ValueError, match=r"one shape \[B, T\], got \[\(2, 3\), \(2, 3\), \(2, 1\)\]"):
        Credit(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 1))


def test_credit_rows_move_together() -> None:
    """The three tensors are indexed alike."""
    credit = Credit(torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [4.0]]), torch.tensor([[5.0], [6.0]]))
    picked = credit.rows(torch.tensor([1, 1, 0]))
    assert picked.advantage.tolist() == [[2.0], [2.0], [1.0]]
    assert picked.weight.tolist() == [[4.0], [4.0], [3.0]]
    assert picked.count.tolist() == [[6.0], [6.0], [5.0]]
