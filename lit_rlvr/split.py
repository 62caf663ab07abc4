"""Splitting rows into parts that stay within a budget of tokens."""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

import torch
from torch import Tensor


def split_rows(lengths: Tensor, budget: int) -> list[Tensor]:
    """Group rows of similar length so that rows x longest stays within ``budget`` tokens; one row at the least.

    >>> [part.tolist() for part in split_rows(torch.tensor([2, 8, 2, 3]), budget=8)]
    [[1], [3, 0], [2]]
    """
    parts: list[Tensor] = []
    order = torch.argsort(lengths, descending=True, stable=True)
    start = 0
    while start < len(order):
        fits = max(1, budget // max(1, int(lengths[order[start]])))
        parts.append(order[start : start + fits])
        start += fits
    return parts


CHEAP = 8
"""A group is begun in what is left of a part if its prompt, which is then computed twice, is this much shorter than its
responses together."""


def split_prompts(prompts: Tensor, responses: Tensor, same: Tensor, budget: int) -> list[Tensor]:
    """Split rows into few parts of like size, whose responses, and prompts once each, stay within ``budget`` tokens.

    Rows with one prompt stay together where the budget allows it, unless the prompt is short. One row at the least; the
    largest part comes first.

    Args:
        prompts: Prompt tokens of each row [n].
        responses: Tokens after the prompt [n].
        same: Rows of one number have the same prompt [n].
        budget: Tokens.

    >>> rows = split_prompts(torch.tensor([2, 2, 2, 3]), torch.tensor([4, 4, 3, 5]), torch.tensor([7, 7, 7, 8]), 10)
    >>> [part.tolist() for part in rows]
    [[1, 2], [3], [0]]
    """
    groups = Groups.of(prompts, responses, same)
    fewest = len(groups.split(budget))
    low, high = 0, budget  # as many parts do with a smaller budget where they can be more even
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if len(groups.split(middle)) <= fewest else (middle, high)
    parts = sorted(groups.split(high), key=groups.tokens, reverse=True)
    return [torch.tensor(part, dtype=torch.int64).sort().values for part in parts]


class Groups(NamedTuple):
    """Rows by their prompts.

    Args:
        rows: The rows of each prompt.
        prompts: Tokens of each row's prompt.
        responses: Tokens of each row after it.
        same: Number of each row's prompt.
    """

    rows: list[list[int]]
    prompts: list[int]
    responses: list[int]
    same: list[int]

    @classmethod
    def of(cls, prompts: Tensor, responses: Tensor, same: Tensor) -> Groups:
        """Group rows [n] by the number of their prompt."""
        rows = defaultdict(list)
        for row, number in enumerate(same.tolist()):
            rows[number].append(row)
        return cls(list(rows.values()), prompts.tolist(), responses.tolist(), same.tolist())

    def tokens(self, part: list[int]) -> int:
        """Tokens of a part, each prompt counted once."""
        prompts = {self.same[row]: self.prompts[row] for row in part}
        return sum(prompts.values()) + sum(self.responses[row] for row in part)

    def split(self, budget: int) -> list[list[int]]:
        """Fill one part after the other."""
        parts: list[list[int]] = []
        room = -1
        for group in self.rows:
            prompt, own = self.prompts[group[0]], sum(self.responses[row] for row in group)
            if prompt + own > room and prompt * CHEAP > own:
                room = -1
            begun = False
            for row in group:
                need = self.responses[row] + (0 if begun else prompt)
                if need > room:
                    parts.append([])
                    need, room = self.responses[row] + prompt, budget
                parts[-1].append(row)
                room, begun = room - need, True
        return parts
