"""Laying sequences side by side, so that no place is padding and a prompt stands once for all of its responses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from lit_rlvr.segments import Pack, Part
from lit_rlvr.varlen import Spans

SLACK = 1024
"""Pairs of query and key per sequence that may be wasted on padding to save a call of attention."""


@dataclass(eq=False)
class Stretch:
    """Tokens that are placed as a whole.

    Args:
        tokens: Token ids [t].
        prompt: What it continues, or None where it begins at position 0.
        continued: Whether others continue it.
        start: Its place in the pack, once it has one.
    """

    tokens: Tensor
    prompt: Stretch | None = None
    continued: bool = False
    start: int = -1

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def places(self) -> range:
        """Its tokens' places in the pack."""
        return range(self.start, self.start + len(self))

    @property
    def before(self) -> int:
        """Tokens before it that it attends to."""
        return 0 if self.prompt is None else len(self.prompt)


def pack_rows(
    prompts: Sequence[Tensor], responses: Sequence[Tensor], same: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor, Pack]:
    """Pack rows; those with one number in ``same`` share their prompt.

    Args:
        prompts: Prompt of each row.
        responses: What follows it; may be empty.
        same: Rows of one number have the same prompt [n].

    Returns:
        Token ids [1, total], places of each row's last prompt token and of its first response token [n], and the pack.
    """
    rows: list[tuple[Stretch, Stretch]] = []
    times, stems = Counter(same), dict[int, Stretch]()
    for prompt, response, number in zip(prompts, responses, same, strict=True):
        if times[number] > 1:
            stem = stems.setdefault(number, Stretch(prompt, continued=True))
            rows.append((stem, Stretch(response, prompt=stem)))
        else:
            whole = Stretch(torch.cat([prompt, response]))
            rows.append((whole, whole))
    ids, pack = place(list(dict.fromkeys(s for row in rows for s in row if len(s))))
    last = [stem.start + len(prompt) - 1 for (stem, _), prompt in zip(rows, prompts, strict=True)]
    first = [end + 1 if own is stem else own.start for (stem, own), end in zip(rows, last, strict=True)]
    return ids, torch.tensor(last), torch.tensor(first), pack


def place(stretches: list[Stretch]) -> tuple[Tensor, Pack]:
    """Give every stretch, of which none is empty, its place.

    Returns:
        Token ids [1, total] and what attention needs to know.
    """
    # Beginnings first, then by what comes before; continued ones of one length are neighbours.
    ordered = sorted(stretches, key=lambda s: (s.before, -len(s), not s.continued))
    start, parts = 0, []
    for stretch in ordered:
        stretch.start = start
        start += len(stretch)
    for members in _alike(ordered):
        prompts, owner = _prompts(members)
        parts.append(Part.of(members[0].start, [len(s) for s in members], prompts, owner))
    positions = torch.cat([torch.arange(s.before, s.before + len(s)) for s in ordered])
    spans = Spans.of([(range(0) if s.prompt is None else s.prompt.places, s.places) for s in ordered])
    return torch.cat([s.tokens for s in ordered])[None], Pack(positions[None], tuple(parts), spans)


def _alike(ordered: list[Stretch]) -> Iterator[list[Stretch]]:
    """Neighbours with as many tokens before them, and of like length."""
    for before, group in groupby(ordered, key=lambda s: s.before):

        def pairs(stretch: Stretch, before: int = before) -> int:
            return len(stretch) * (before + len(stretch))

        members: list[Stretch] = []
        for stretch in group:
            if members and pairs(members[0]) - pairs(stretch) > max(SLACK, pairs(stretch) // 4):
                yield members
                members = []
            members.append(stretch)
        yield members


def _prompts(members: list[Stretch]) -> tuple[tuple[int, int, int] | None, list[int]]:
    """Where the prompts of ``members`` stand, all of that length, and which of them each continues."""
    length = members[0].before
    if not length:
        return None, []
    starts = [s.prompt.start for s in members if s.prompt is not None]
    first, last = min(starts), max(starts)
    return (first, (last - first) // length + 1, length), [(start - first) // length for start in starts]
