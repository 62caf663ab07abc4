"""Cutting rows into micro-batches by a token budget, and laying them out without padding in the head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_rlvr.reduce import Reduce
from lit_rlvr.types import RolloutBatch


@dataclass(frozen=True)
class MicroBatch:
    """Rows as the policy reads them.

    Args:
        ids: Prompt and response, padded on the right [N, S].
        index: Flat places in [N * S] of the hidden states that predict ``targets`` [M].
        targets: The response tokens to score [M].
        row: Row of each target in the rollout [M].
        column: Position of each target in its response [M].
    """

    ids: Tensor
    index: Tensor
    targets: Tensor
    row: Tensor
    column: Tensor


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


def enters(chosen: Tensor) -> Tensor:
    """Response tokens that a chosen one comes after [B, T]: with the prompt, all that the forward pass needs.

    >>> enters(torch.tensor([[False, True, False, True, False], [True, False, False, False, False]])).int().tolist()
    [[1, 1, 1, 0, 0], [0, 0, 0, 0, 0]]
    """
    after = chosen.flip(-1).cumsum(-1).flip(-1) - chosen.int()
    return after > 0


def lay_out(rollout: RolloutBatch, rows: Tensor, chosen: Tensor, device: torch.device) -> MicroBatch:
    """Lay out ``rows`` [n] of a rollout, asking for the response tokens that ``chosen`` [B, T] marks.

    What stands behind the state that predicts a row's last chosen token is left out: attention is causal.
    """
    prompt_mask, entering = rollout.prompt_mask[rows], enters(chosen)[rows]
    prompt, total = prompt_mask.sum(-1), prompt_mask.sum(-1) + entering.sum(-1)
    width = int(total.max()) if len(rows) else 0
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    place = torch.arange(width)[None, :]
    ids[place < prompt[:, None]] = rollout.prompt_ids[rows][prompt_mask]
    ids[(place >= prompt[:, None]) & (place < total[:, None])] = rollout.response_ids[rows][entering]
    local, column = chosen[rows].nonzero(as_tuple=True)
    # The hidden state at place s predicts the token at s + 1.
    index = local * width + prompt[local] + column - 1
    targets = rollout.response_ids[rows[local], column]
    return MicroBatch(*(t.to(device) for t in (ids, index, targets, rows[local], column)))


def empty(device: torch.device) -> MicroBatch:
    """A micro-batch with one token and nothing to learn: it keeps ranks that have no work in step with the others."""
    nothing = torch.zeros(0, dtype=torch.int64, device=device)
    return MicroBatch(torch.zeros(1, 1, dtype=torch.int64, device=device), nothing, nothing, nothing, nothing)


def cut(
    rollout: RolloutBatch, chosen: Tensor, budget: int, size: int | None, device: torch.device, reduce: Reduce
) -> list[tuple[MicroBatch, bool]]:
    """Cut the rows that have a chosen token into micro-batches; the flag marks the last.

    All ranks get the same number, at least one: a rank with fewer rows gets empty ones at the end.

    Args:
        rollout: The rows.
        chosen: The response tokens to ask for [B, T].
        budget: Tokens per micro-batch, padding included.
        size: Rows per micro-batch, in their order, instead of a budget.
        device: Where the policy is.
        reduce: Counts over ranks.
    """
    rows = chosen.any(-1).nonzero().squeeze(-1)
    if size is None:
        lengths = (rollout.prompt_mask.sum(-1) + enters(chosen).sum(-1))[rows]
        parts = [rows[part] for part in split_rows(lengths, budget)]
    else:
        parts = list(rows.split(size)) if len(rows) else []
    number = max(1, int(reduce.max(torch.tensor(len(parts)))))
    micros = [lay_out(rollout, part, chosen, device) for part in parts]
    micros += [empty(device)] * (number - len(micros))
    return [(micro, i == number - 1) for i, micro in enumerate(micros)]
