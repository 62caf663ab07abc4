"""Attention over a pack: many sequences in one row, where each sees itself and, if it continues one, a prompt.

A mask over the whole pack would cost the square of its length. Where :mod:`lit_rlvr.varlen` serves, all sequences take
one call; else every sequence is attended to on its own, and those of like length in one call. A model computes packs
after :func:`enable`, which registers :func:`attend` with transformers; without a pack that function is transformers'
own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lit_rlvr.devices import send
from lit_rlvr.grouped import attend_one, serves_one
from lit_rlvr.varlen import Spans, attend_spans, varlen_serves

NAME = "lit_rlvr_segments"

BLOCK = 512
"""Queries that take a mask at a time, so that masks do not grow with the square of a sequence."""


@dataclass(frozen=True)
class Part:
    """Sequences side by side in a pack that take one call, filled up to the longest for that call alone.

    Args:
        start: Place of the first token.
        lengths: Tokens of each, the longest first [n].
        prompts: Of the prompts that they continue, which are side by side and equally long: place of the first, number
            and length; None: they continue nothing.
        owner: Which of these prompts each continues [n].
        spread: Where each place of [n * longest] is read, counted from ``start``; None: all are equally long.
        real: The places of [n * longest] that hold a token, in order.
    """

    start: int
    lengths: tuple[int, ...]
    prompts: tuple[int, int, int] | None = None
    owner: Tensor | None = None
    spread: Tensor | None = None
    real: Tensor | None = None

    @classmethod
    def of(cls, start: int, lengths: Sequence[int], prompts: tuple[int, int, int] | None, owner: Sequence[int]) -> Self:
        """Make a part; ``owner`` counts only with ``prompts``."""
        part = cls(start, tuple(lengths), prompts, None if prompts is None else torch.tensor(owner))
        if lengths[0] == lengths[-1]:
            return part
        own = torch.tensor(lengths)[:, None]
        place = torch.arange(lengths[0])[None, :]
        first = own.cumsum(0) - own
        return replace(
            part, spread=(first + place.minimum(own - 1)).flatten(), real=(place < own).flatten().nonzero().squeeze(1)
        )

    def to(self, device: torch.device) -> Self:
        """The same with its tensors on ``device``."""
        owner, spread, real = (t if t is None else send(t, device) for t in (self.owner, self.spread, self.real))
        return replace(self, owner=owner, spread=spread, real=real)

    def own(self, values: Tensor) -> Tensor:
        """The part's tokens [n, longest, ...] of ``values`` [total, ...]."""
        piece = values[self.start : self.start + sum(self.lengths)]
        if self.spread is not None:
            assert self.real is not None
            spread: Any = _Spread.apply
            piece = spread(piece, self.spread, self.real)
        filled: Tensor = piece.unflatten(0, (len(self.lengths), self.lengths[0]))
        return filled

    def packed(self, values: Tensor) -> Tensor:
        """The real ones of [n, longest, ...], side by side."""
        flat = values.flatten(0, 1)
        return flat if self.real is None else flat.index_select(0, self.real)

    def with_prompts(self, values: Tensor) -> Tensor:
        """The part's tokens behind the prompt of each [n, prompt + longest, ...]."""
        own = self.own(values)
        if self.prompts is None:
            return own
        start, number, length = self.prompts
        prompts = values[start : start + number * length].unflatten(0, (number, length))
        assert self.owner is not None
        each = prompts.expand(len(own), *prompts.shape[1:]) if number == 1 else prompts.index_select(0, self.owner)
        return torch.cat([each, own], 1)


class _Spread(torch.autograd.Function):
    """``values[spread]`` where what is read twice has no gradient of its own: padding, which no token looks at."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, spread: Tensor, real: Tensor) -> Tensor:
        ctx.save_for_backward(real)
        return values.index_select(0, spread)

    @staticmethod
    def backward(ctx: Any, *outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (real,) = ctx.saved_tensors
        return outputs[0].index_select(0, real), None, None


@dataclass(frozen=True)
class Pack:
    """What attention needs to know of a pack.

    Args:
        positions: Position of each token in its sequence [1, total].
        parts: All sequences, in the order of the pack.
        spans: The same sequences, for attention in one call.
        read: Places whose last hidden states are read, each once; those of others may be anything. None: all.
    """

    positions: Tensor
    parts: tuple[Part, ...]
    spans: Spans
    read: Tensor | None = None
    _masks: dict[Any, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def to(self, device: torch.device) -> Pack:
        """The same with its tensors on ``device``."""
        parts = tuple(part.to(device) for part in self.parts)
        read = None if self.read is None else send(self.read, device)
        return Pack(send(self.positions, device), parts, self.spans.to(device), read)

    def mask(self, rows: int, keys: int, window: int | None, like: Tensor) -> Tensor:
        """Additive mask [rows, keys] of the last queries and the last keys of a sequence. All layers share it."""
        key = (rows, keys, window, like.dtype)
        if key not in self._masks:
            seen = torch.ones(rows, keys, dtype=torch.bool, device=like.device).tril(keys - rows)
            if window is not None:
                seen = seen.triu(keys - rows - window + 1)
            blank = torch.zeros(seen.shape, dtype=like.dtype, device=like.device)
            self._masks[key] = blank.masked_fill_(~seen, -torch.inf)
        return self._masks[key]


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    pack: Pack | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers' attention interface asks: heads [1, h, total, d] of a pack to [1, total, h, d].

    Raises:
        ValueError: When the model has kept the pack from its attention.
    """
    if pack is None:
        if attention_mask is not None and attention_mask.shape == (1, 1, 1, 1) and query.shape[2] > 1:
            raise ValueError("the model does not hand its attention what packs need")
        if serves_one(query, key, attention_mask, kwargs):
            return attend_one(query, key, value, attention_mask, kwargs.get("scaling")), None
        return sdpa_attention_forward(module, query, key, value, attention_mask, is_causal=is_causal, **kwargs)
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    if varlen_serves(query, value, kwargs):
        return attend_spans(query, key, value, pack.spans, sliding_window, kwargs.get("scaling"))[None], None
    pieces = []
    for part in pack.parts:
        q, k, v = (t.transpose(1, 2) for t in (part.own(query), part.with_prompts(key), part.with_prompts(value)))
        outputs = []
        for rows, keys, mask in blocks(pack, q, k, sliding_window):
            seen = (q[:, :, rows], k[:, :, keys], v[:, :, keys])
            outputs.append(sdpa_attention_forward(module, *seen, mask, is_causal=mask is None, **kwargs)[0])
        pieces.append(part.packed(torch.cat(outputs, 1) if len(outputs) > 1 else outputs[0]))
    return torch.cat(pieces)[None], None


def blocks(pack: Pack, query: Tensor, key: Tensor, window: int | None) -> Iterator[tuple[slice, slice, Tensor | None]]:
    """Queries of sequences, which keys they are shown, and the mask [1, 1, queries, keys]; None: plain causal.

    Args:
        pack: Has the masks.
        query: [n, heads, queries, d].
        key: [n, key heads, keys, d]; those of a prompt first.
        window: Keys that a query sees, itself included; None: all.
    """
    length, total = query.shape[2], key.shape[2]
    window = window if window is not None and window < total else None
    if length == total and window is None:
        yield slice(None), slice(None), None
        return
    most = min(BLOCK, length)
    mask = pack.mask(most, total if window is None else min(total, most + window - 1), window, query)
    for start in range(0, length, most):
        stop = min(start + most, length)
        last = total - length + stop
        first = 0 if window is None else max(0, last - (stop - start) - window + 1)
        # What a query sees depends on its distance from the last key: every mask is a corner of one. Kernels of GPUs
        # want its rows aligned in memory.
        corner = mask[start - stop :, first - last :]
        corner = corner if corner.device.type == "cpu" else corner.contiguous()
        yield slice(start, stop), slice(first, last), corner[None, None]


def hidden_states(body: Any, ids: Tensor, pack: Pack | None) -> Tensor:
    """Last hidden states [N, S, D] of a model's body; with a pack N is 1."""
    if pack is None:
        hidden: Tensor = body(input_ids=ids, use_cache=False).last_hidden_state
        return hidden
    # A mask of four dimensions is taken as it is: transformers would make one of total x total from the positions.
    nothing = torch.zeros(1, 1, 1, 1, device=ids.device, dtype=body.dtype)
    packed: Tensor = body(
        input_ids=ids, position_ids=pack.positions, attention_mask=nothing, use_cache=False, pack=pack
    ).last_hidden_state
    return packed


def enable(hf: PreTrainedModel) -> str | None:
    """Let a model compute packs; returns why it cannot, if it cannot.

    What else it computes is as before.
    """
    if (found := hf.config.get_text_config()._attn_implementation) != "sdpa":
        return f"its attention is {found}, not sdpa"
    if getattr(hf.config.get_text_config(), "attn_logit_softcapping", None) is not None:
        return "its attention has a soft-cap, which sdpa leaves out"
    if not hf._can_set_attn_implementation():
        return "its attention cannot be exchanged"
    ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)
    hf.set_attn_implementation(NAME)
    return None
