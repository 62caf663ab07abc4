"""A key-value cache that is written in place: rows are slots, and all rows end at the same column.

transformers' growing cache is copied whole for every token. Here a token's keys and values are written into memory that
is already there, and attention reads a view of what is filled. A row that begins later begins at a later column; the
slot of a row that has finished is taken by the last row, and then by a waiting one.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

SPARE = 64
"""Columns that storage grows by at the least; otherwise by a quarter of what it has."""
FREED = 8
"""Columns in use move to the front where that frees an eighth of their number, and never fewer than can be spared."""
PARTS = 8
"""Slots move in so many parts, one after the other: each is copied on its way."""
ALIGNED = 16
"""Its columns are a multiple of this: kernels on a GPU copy a mask that is not aligned."""


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer.

    The storage is [slots, heads, columns, head size]; rows ``[0, rows)`` and columns ``[low, high)`` are in use, where
    the longest row begins at ``low`` and every row ends at ``high``.

    Args:
        slots: Most rows at a time.
        window: Tokens that attention reaches back, the current one included; None for all. No more are kept.
        spare: Columns that storage grows by at the least.
        most: Columns of the longest row possible: while rows that begin together need no more, storage has no more, and
            never more than :func:`widest`.
    """

    def __init__(self, slots: int, window: int | None = None, spare: int = SPARE, most: int = sys.maxsize) -> None:
        super().__init__()
        self.slots, self.window, self.is_sliding = slots, window, window is not None
        self.spare, self.most = spare, most if window is None else min(most, window)
        self.rows, self.low, self.high = 0, 0, 0
        self.length = 0
        """Tokens of the longest row, those before its window included."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = (
            torch.empty(self.slots, states.shape[1], 0, states.shape[3], dtype=kept_dtype(states), device=states.device)
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write a new column [rows, heads, 1, head size] and return everything in use."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        past, first = self.high - self.low, self.extend(key_states.shape[2])
        keys, values = self.storage
        keys[: self.rows, :, first : self.high] = key_states
        values[: self.rows, :, first : self.high] = value_states
        used = (slice(self.rows), slice(None), slice(first - past, self.high))
        return keys[used], values[used]

    def extend(self, columns: int = 1) -> int:
        """Use so many columns more, whose keys and values are still to be written. Returns the first."""
        self._make_room(columns)
        first, self.high = self.high, self.high + columns
        self.use(self.rows, self.length + columns)
        return first

    def admit(self, prompts: CacheLayerMixin, index: Tensor, tokens: Tensor, length: int) -> None:
        """Put the rows ``index`` [n] of a prefilled layer, each with so many ``tokens`` [n], behind those in use.

        There they are padded on the right, here on the left. The longest of all then holds ``length`` tokens: fewer
        than ``prompts`` is wide, where only short ones are left.
        """
        assert prompts.keys is not None
        assert prompts.values is not None
        if not self.is_initialized:
            self.lazy_initialization(prompts.keys, prompts.values)
        rows, width = self.rows + len(index), prompts.keys.shape[2]
        width = width if self.window is None else min(width, self.window - 1)
        if self.high < width:
            if width > self.storage[0].shape[2]:
                self._grow(width)
            self._move(width)
        place = (slice(self.rows, rows), slice(None), slice(self.high - width, self.high))
        columns = (tokens[:, None] - width + torch.arange(width, device=tokens.device)).clamp_(min=0)
        for storage, theirs in zip(self.storage, (prompts.keys, prompts.values), strict=True):
            storage[place] = theirs[index[:, None], :, columns].transpose(1, 2)
        self.use(rows, length)

    def keep(self, holes: Tensor, movers: Tensor) -> None:
        """Overwrite the slots ``holes`` [m] with the slots ``movers`` [m]."""
        used = slice(self.low, self.high)
        for storage in self.storage:
            storage[holes, :, used] = storage[movers, :, used]

    def use(self, rows: int, length: int) -> None:
        """Use the first ``rows`` slots from now on, of which the longest holds ``length`` tokens."""
        self.rows, self.length = rows, length
        kept = length if self.window is None else min(length, self.window - 1)
        self.low = self.high - kept

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        kept = self.high - self.low
        return kept + query_length, self.length - kept

    def get_max_length(self) -> int:
        return -1 if self.window is None else self.window

    @property
    def storage(self) -> tuple[Tensor, Tensor]:
        """Keys and values [slots, heads, columns, head size], in use or not."""
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def _make_room(self, columns: int) -> None:
        """Have ``columns`` free columns after the last: move to the front, or grow where that would free too few."""
        if self.high + columns > self.storage[0].shape[2]:
            kept = self.high - self.low
            if self.low >= max(columns, freed(kept, self.spare)):
                self._move(kept)
            else:
                self._grow(self.high + columns)

    def _grow(self, columns: int) -> None:
        """Have at least so many columns, and some to spare. Zeros, because a masked column times NaN would be NaN."""
        wide = columns + max(self.spare, self.storage[0].shape[2] // 4)
        limits = (self.most, widest(self.most, self.spare))
        wide = aligned(min([wide, *(limit for limit in limits if limit >= columns)]))
        used = (slice(self.rows), slice(None), slice(self.low, self.high))
        for name, old in zip(("keys", "values"), self.storage, strict=True):
            new = old.new_zeros(*old.shape[:2], wide, old.shape[3])
            new[used] = old[used]
            setattr(self, name, new)

    def _move(self, high: int) -> None:
        """Let the columns in use end at ``high``; the storage stays where it is, as captured graphs know it."""
        kept = self.high - self.low
        if kept and self.rows:
            for storage in self.storage:
                for part in storage[: self.rows].split(-(-self.rows // PARTS)):
                    part[:, :, high - kept : high] = part[:, :, self.low : self.high].clone()
        self.low, self.high = high - kept, high


class WholeLayer(CacheLayerMixin):
    """The storage of a layer as one step sees it that reads all columns, in use or not; it needs a mask.

    Args:
        layer: The layer.
        rows: How many of its slots are read.
        column: The column that the step writes; a tensor [1] where it is captured.
    """

    is_sliding = False

    def __init__(self, layer: SlotLayer, rows: int, column: int | Tensor) -> None:
        super().__init__()
        self.keys, self.values = (storage[:rows] for storage in layer.storage)
        self.column, self.is_initialized = column, True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the storage is there."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the column [rows, heads, 1, head size] and return everything."""
        assert self.keys is not None
        assert self.values is not None
        for storage, states in ((self.keys, key_states), (self.values, value_states)):
            if isinstance(self.column, int):
                storage[:, :, self.column : self.column + 1] = states
            else:
                storage.index_copy_(2, self.column, states.to(storage.dtype))
        return self.keys, self.values

    def get_seq_length(self) -> int:
        assert self.keys is not None
        return self.keys.shape[2] - 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1


class SlotCache(Cache):
    """The layers' storage, and what happens to all of them at once.

    Args:
        windows: The window of each layer; see :func:`windows`.
        slots: Most rows at a time.
        spare: Columns that storage grows by at the least.
        most: Columns of the longest row possible.
    """

    def __init__(self, windows: list[int | None], slots: int, spare: int = SPARE, most: int = sys.maxsize) -> None:
        self.slots: list[SlotLayer] = [SlotLayer(slots, window, spare, most) for window in windows]
        super().__init__(layers=list(self.slots))

    def extend(self) -> int:
        """Use one column more in every layer, where it is the same one, which is still to be written. Returns it."""
        (column,) = {layer.extend() for layer in self.slots}
        return column

    @property
    def width(self) -> int:
        """Columns of the layers' storage: another number after it has grown."""
        (width,) = {layer.storage[0].shape[2] for layer in self.slots}
        return width

    def admit(self, prompts: Cache, index: Tensor, tokens: Tensor, length: int) -> None:
        """Add rows ``index`` [n], of so many ``tokens`` [n], of prefilled prompts; the longest of all is ``length``."""
        for mine, theirs in zip(self.slots, prompts.layers, strict=True):
            assert isinstance(theirs, CacheLayerMixin)
            mine.admit(theirs, index, tokens, length)

    def keep(self, holes: Tensor, movers: Tensor, rows: int, length: int) -> None:
        """Move slots ``movers`` [m] to ``holes`` [m]; use the first ``rows`` from now on, the longest of ``length``."""
        for layer in self.slots:
            if len(holes):
                layer.keep(holes, movers)
            layer.use(rows, length)


def freed(kept: int, spare: int) -> int:
    """Columns that a move of so many has to free, so that the columns written until the next one pay for it."""
    return max(spare, kept // FREED)


def widest(most: int, spare: int) -> int:
    """Columns that a layer's storage never exceeds whose longest row takes ``most``: it grows no more than it must."""
    return aligned(most + freed(most, spare))


def aligned(columns: int) -> int:
    """At least so many, and a multiple of :data:`ALIGNED`."""
    return -(-columns // ALIGNED) * ALIGNED


def kept_dtype(states: Tensor) -> torch.dtype:
    """Under autocast attention rounds float32 to its dtype, so what is kept is rounded once, not for every token."""
    kind = states.device.type
    narrow = states.dtype == torch.float32 and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if narrow else states.dtype


def windows(config: Any) -> list[int | None] | None:
    """The attention window of each layer (None where it sees all), or None where slots do not serve the architecture.

    They serve where every layer keeps keys and values of its own, for all tokens or for a sliding window. States of
    linear attention, chunked attention and layers that share keys are left to transformers' cache.
    """
    types = getattr(config.get_text_config(), "layer_types", None) or []
    layers = DynamicCache(config=config).layers
    if "chunked_attention" in types or getattr(config.get_text_config(), "attention_chunk_size", None):
        return None
    if not all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
        return None
    return [layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else None for layer in layers]
