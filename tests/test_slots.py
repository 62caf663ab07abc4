"""Storage that is written in place, against rows that are kept one by one: contents, and how wide it may become."""

from __future__ import annotations

from unittest.mock import patch

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from lit_rlvr.engines.slots import ALIGNED, SlotCache, SlotLayer, widest

LAWS = settings(max_examples=60, deadline=None, derandomize=True)
NONE = torch.zeros(0, dtype=torch.int64)


class Rows:
    """A cache of one layer beside a plain list of what each of its slots holds [2, tokens, 3].

    Args:
        slots: Most rows at a time.
        window: Of the layer.
        spare: Columns that storage grows by at the least.
        most: Tokens of the longest row.
    """

    def __init__(self, slots: int, window: int | None, spare: int, most: int) -> None:
        self.slots, self.window, self.most = slots, window, most
        self.cache = SlotCache([window], slots, spare, most)
        self.layer = self.cache.slots[0]
        self.held: list[Tensor] = []
        self.bound = widest(most if window is None else min(most, window), spare)
        self.place: tuple[int, int] | None = None

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max((row.shape[1] for row in self.held), default=0)

    def admit(self, lengths: list[int]) -> None:
        """Let rows of these lengths begin, as many as fit."""
        new = [torch.randn(2, n, 3) for n in lengths[: self.slots - len(self.held)]]
        if not new:
            return
        prompts = DynamicCache()
        layer = DynamicLayer()
        width = max(row.shape[1] for row in new)
        keys = torch.stack([torch.nn.functional.pad(row, (0, 0, 0, width - row.shape[1]), value=9.0) for row in new])
        layer.update(keys, -keys)
        prompts.layers = [layer]
        self.held += new
        tokens = torch.tensor([row.shape[1] for row in new])
        self.cache.admit(prompts, torch.arange(len(new)), tokens, self.longest)

    def step(self) -> None:
        """A token for every row; those that are as long as any may be leave before."""
        self.leave([slot for slot, row in enumerate(self.held) if row.shape[1] == self.most])
        if not self.held:
            return
        new = torch.randn(len(self.held), 2, 1, 3)
        self.held = [torch.cat([row, own], 1) for row, own in zip(self.held, new, strict=True)]
        keys, values = self.layer.update(new, -new)
        assert torch.equal(values, -keys)
        assert self.layer.get_seq_length() == self.longest
        for mine, row in zip(keys, self.held, strict=True):
            seen = row if self.window is None else row[:, -self.window :]
            assert torch.equal(mine[:, -seen.shape[1] :], seen)

    def leave(self, slots: list[int]) -> None:
        """Let rows end; the last take their slots."""
        count = len(self.held) - len(slots)
        holes = [slot for slot in slots if slot < count]
        movers = [slot for slot in range(count, len(self.held)) if slot not in slots]
        for hole, mover in zip(holes, movers, strict=True):
            self.held[hole] = self.held[mover]
        del self.held[count:]
        self.cache.keep(torch.tensor(holes, dtype=torch.int64), torch.tensor(movers, dtype=torch.int64), count,
                        self.longest)  # fmt: skip

    def check(self) -> None:
        """The storage is no wider than it may be, and where it was unless it has grown."""
        width, address = self.cache.width, self.layer.storage[0].data_ptr()
        assert width <= self.bound
        assert width % ALIGNED == 0
        if self.place is not None and self.place[0] == width:
            assert self.place[1] == address
        self.place = width, address


@LAWS
@given(
    slots=st.integers(1, 12),
    window=st.sampled_from([None, None, 2, 5, 20]),
    spare=st.sampled_from([1, 4, 16]),
    most=st.sampled_from([4, 30, 90, 200]),
    data=st.data(),
)
def test_any_admissions_and_ends(slots: int, window: int | None, spare: int, most: int, data: st.DataObject) -> None:
    """Contents are those of rows that are kept one by one, and the bound on the width holds."""
    torch.manual_seed(0)
    rows = Rows(slots, window, spare, most)
    for _ in range(data.draw(st.integers(1, 12))):
        rows.admit(data.draw(st.lists(st.integers(1, most), min_size=0 if rows.held else 1, max_size=4)))
        for _ in range(data.draw(st.integers(1, 40))):
            rows.step()
            rows.check()
        if rows.held:
            rows.leave(sorted(data.draw(st.sets(st.integers(0, len(rows.held) - 1)))))


def test_moves_are_few_and_storage_grows_no_more_than_it_must() -> None:
    """Rows of very different lengths that begin as others end: each move is paid for by the columns that it frees."""
    torch.manual_seed(0)
    rows, most, spare, steps = Rows(4, None, 8, 120), 120, 8, 2000
    rows.admit([10, 10, 10, 10])
    with (
        patch.object(SlotLayer, "_move", autospec=True, side_effect=SlotLayer._move) as moves,
        patch.object(SlotLayer, "_grow", autospec=True, side_effect=SlotLayer._grow) as grows,
    ):
        for step in range(steps):
            rows.step()
            rows.check()
            if step % 13 == 0 and step % 400 < 200:  # for a while one row is alone with short ones
                rows.leave([1])
            rows.admit([10] * 4)
    assert rows.cache.width > most
    assert 10 < moves.call_count <= steps // spare
    assert grows.call_count < 8
