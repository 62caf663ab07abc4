"""Attention over a pack: many sequences in one row, where each sees itself and, if it continues one, a prompt.

A mask over the whole pack would cost the square of its length. Here every sequence is attended to on its own, and those
of like length in one call. A model computes packs after :func:`enable`, which registers :func:`attend` with
transformers; without a pack that function is transformers' own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lit_rlvr.grouped import attend_one, serves_one

NAME = "lit_rlvr_segments"


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
        owner, spread, real = (t if t is None else t.to(device) for t in (self.owner, self.spread, self.real))
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
    """

    positions: Tensor
    parts: tuple[Part, ...]
    _masks: dict[Any, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def to(self, device: torch.device) -> Pack:
        """The same with its tensors on ``device``."""
        return Pack(self.positions.to(device), tuple(part.to(device) for part in self.parts))

    def mask(self, part: Part, window: int | None, like: Tensor) -> Tensor | None:
        """Additive mask [longest, prompt + longest] of a part; None: plain causal. All layers share it."""
        length, before = part.lengths[0], 0 if part.prompts is None else part.prompts[2]
        narrow = window is not None and window < before + length
        if not before and not narrow:
            return None
        key = (length, before, window if narrow else None, like.dtype)
        if key not in self._masks:
            seen = torch.ones(length, before + length, dtype=torch.bool, device=like.device).tril(before)
            if narrow:
                assert window is not None
                seen = seen.triu(before - window + 1)
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
    pieces = []
    for part in pack.parts:
        q, k, v = (t.transpose(1, 2) for t in (part.own(query), part.with_prompts(key), part.with_prompts(value)))
        mask = pack.mask(part, sliding_window, q)
        mask = None if mask is None else mask[None, None]
        attended, _ = sdpa_attention_forward(module, q, k, v, mask, is_causal=mask is None, **kwargs)
        pieces.append(part.packed(attended))
    return torch.cat(pieces)[None], None


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
    if not hf._can_set_attn_implementation():
        return "its attention cannot be exchanged"
    ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)
    hf.set_attn_implementation(NAME)
    return None
