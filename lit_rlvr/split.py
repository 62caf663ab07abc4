"""Splitting rows into parts that stay within a budget of tokens."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

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


def fill(costs: Sequence[int], budget: int) -> list[list[int]]:
    """Spread items over the fewest bins found that stay within ``budget``, evenly; the fullest bin comes first.

    An item above the budget has a bin of its own.

    >>> fill([4, 3, 2, 2, 1], budget=6)
    [[0, 3], [1, 2, 4]]
    """
    order = sorted(range(len(costs)), key=lambda i: -costs[i])
    # No fewer can do: by their sum, and because two items above half the budget never go together.
    number = max(1, -(-sum(min(cost, budget) for cost in costs) // budget), sum(2 * c > budget for c in costs))
    while True:
        bins = [(0, i, list[int]()) for i in range(number)]
        for item in order:  # the largest first, each to the emptiest bin
            total, i, members = heapq.heappop(bins)
            members.append(item)
            heapq.heappush(bins, (total + costs[item], i, members))
        if all(total <= budget or len(members) == 1 for total, _, members in bins):
            return [sorted(members) for _, _, members in sorted(bins, key=lambda b: (-b[0], b[1])) if members]
        number += 1


def split_prompts(prompts: Tensor, responses: Tensor, same: Tensor, budget: int) -> list[Tensor]:
    """Group rows so that each part's responses, and its prompts once each, stay within ``budget`` tokens.

    Rows with one prompt stay together where the budget allows it. One row at the least.

    Args:
        prompts: Prompt tokens of each row [n].
        responses: Tokens after the prompt [n].
        same: Rows of one number have the same prompt [n].
        budget: Tokens.

    >>> rows = split_prompts(torch.tensor([2, 2, 2, 3]), torch.tensor([4, 4, 3, 5]), torch.tensor([7, 7, 7, 8]), 10)
    >>> [part.tolist() for part in rows]
    [[0, 2], [3], [1]]
    """
    pieces: list[Tensor] = []
    for number in same.unique().tolist():
        rows = (same == number).nonzero().squeeze(-1)
        room = max(1, budget - int(prompts[rows[0]]))
        pieces += [rows[part] for part in fill(responses[rows].tolist(), room)]
    costs = [int(prompts[rows[0]] + responses[rows].sum()) for rows in pieces]
    return [torch.cat([pieces[i] for i in part]).sort().values for part in fill(costs, budget)]
