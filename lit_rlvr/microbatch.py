"""Cutting rows into micro-batches by a token budget, and laying them out for the policy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lit_rlvr.devices import send
from lit_rlvr.last_layer import places_read
from lit_rlvr.layout import Reader
from lit_rlvr.packing import pack_rows
from lit_rlvr.reduce import Reduce
from lit_rlvr.segments import Pack
from lit_rlvr.split import split_prompts, split_rows
from lit_rlvr.types import RolloutBatch

MOST_MASKED = 2**22
"""Pairs of query and key up to which a response shares its prompt, if that takes a mask: some 2,000 tokens."""


@dataclass(frozen=True)
class MicroBatch:
    """Rows as the policy reads them.

    Args:
        ids: Prompt and response, padded on the right [N, S]; or one row of sequences side by side, told apart by
            ``pack``.
        index: Flat places in [N * S] of the hidden states that predict ``targets`` [M].
        targets: The response tokens to score [M].
        row: Row of each target in the rollout [M], on the CPU like the rollout.
        column: Position of each target in its response [M], on the CPU.
        rows: How many rows are laid out.
        padding: How many of the places hold no token.
        pack: What a model needs to know of a row of sequences; None: the rows are padded.
    """

    ids: Tensor
    index: Tensor
    targets: Tensor
    row: Tensor
    column: Tensor
    rows: int = 0
    padding: int = 0
    pack: Pack | None = None

    def to(self, device: torch.device) -> MicroBatch:
        """The same for a policy on ``device``; what tells tokens apart stays with the rollout."""
        pack = None if self.pack is None else self.pack.to(device)
        ids, index, targets = (send(tensor, device) for tensor in (self.ids, self.index, self.targets))
        return replace(self, ids=ids, index=index, targets=targets, pack=pack)


def enters(chosen: Tensor) -> Tensor:
    """Response tokens that a chosen one comes after [B, T]: with the prompt, all that the forward pass needs.

    >>> enters(torch.tensor([[False, True, False, True, False], [True, False, False, False, False]])).int().tolist()
    [[1, 1, 1, 0, 0], [0, 0, 0, 0, 0]]
    """
    after = chosen.flip(-1).cumsum(-1).flip(-1) - chosen.int()
    return after > 0


def lay_out(rollout: RolloutBatch, rows: Tensor, chosen: Tensor, reader: Reader) -> MicroBatch:
    """Lay out ``rows`` [n] of a rollout for a model, asking for the response tokens that ``chosen`` [B, T] marks.

    What stands behind the state that predicts a row's last chosen token is left out: attention is causal.
    """
    local, column = chosen[rows].nonzero(as_tuple=True)
    entering = enters(chosen[rows])
    pack, padding = None, 0
    if reader.layout == "padded":
        ids, before, first, padding = _padded(rollout, rows, entering)
    else:
        same = sharing(rollout, rows, entering.sum(-1), reader)
        prompts = [rollout.prompt_ids[row][rollout.prompt_mask[row]] for row in rows]
        responses = [rollout.response_ids[row][enter] for row, enter in zip(rows, entering, strict=True)]
        ids, before, first, pack = pack_rows(prompts, responses, same.tolist())
    # The hidden state at one place predicts the token at the next.
    index = torch.where(column == 0, before[local], first[local] + column - 1)
    if pack is not None:
        pack = replace(pack, read=places_read(index, ids.numel()))
    targets = rollout.response_ids[rows[local], column]
    return MicroBatch(ids, index, targets, rows[local], column, len(rows), padding, pack).to(reader.device)


def _padded(rollout: RolloutBatch, rows: Tensor, entering: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """Token ids [n, S], flat places of the last token of each prompt and of what follows it [n], and the padding."""
    prompt_mask = rollout.prompt_mask[rows]
    prompt, total = prompt_mask.sum(-1), prompt_mask.sum(-1) + entering.sum(-1)
    width = int(total.max()) if len(rows) else 0
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    at = torch.arange(width)[None, :]
    ids[at < prompt[:, None]] = rollout.prompt_ids[rows][prompt_mask]
    ids[(at >= prompt[:, None]) & (at < total[:, None])] = rollout.response_ids[rows][entering]
    first = torch.arange(len(rows)) * width + prompt
    return ids, first - 1, first, ids.numel() - int(total.sum())


def empty(device: torch.device) -> MicroBatch:
    """A micro-batch with one token and nothing to learn: it keeps ranks that have no work in step with the others."""
    nothing = torch.zeros(0, dtype=torch.int64)
    return MicroBatch(torch.zeros(1, 1, dtype=torch.int64), nothing, nothing, nothing, nothing).to(device)


def sharing(rollout: RolloutBatch, rows: Tensor, responses: Tensor, reader: Reader) -> Tensor:
    """A number per row [n]; rows of one number share their prompt.

    Those have the same prompt, and are short where sharing takes a mask, which would cost a long response more than its
    prompt does.

    Args:
        rollout: The facts.
        rows: Which of its rows [n].
        responses: Response tokens of each that enter the forward pass [n].
        reader: For what model; only the layout ``shared`` shares.
    """
    alone = torch.arange(len(rows))
    if reader.layout != "shared":
        return alone
    mask = rollout.prompt_mask[rows]
    tokens = rollout.prompt_ids[rows].masked_fill(~mask, -1)
    same: Tensor = torch.unique(tokens, dim=0, return_inverse=True)[1]
    long = reader.masks & (responses * (mask.sum(-1) + responses) > MOST_MASKED)
    return torch.where(long, len(rows) + alone, same)


def cut(
    rollout: RolloutBatch,
    chosen: Tensor,
    budget: int,
    size: int | None,
    reader: Reader,
    reduce: Reduce,
) -> Iterator[tuple[MicroBatch, bool]]:
    """Cut the rows that have a chosen token into micro-batches, laid out one by one; the flag marks the last.

    All ranks get the same number, at least one: a rank with fewer rows gets empty ones at the end.

    Args:
        rollout: The rows.
        chosen: The response tokens to ask for [B, T].
        budget: Tokens per micro-batch, padding included.
        size: Rows per micro-batch, in their order, instead of a budget.
        reader: How the model reads them.
        reduce: Counts over ranks.
    """
    rows = chosen.any(-1).nonzero().squeeze(-1)
    prompts, responses = rollout.prompt_mask[rows].sum(-1), enters(chosen[rows]).sum(-1)
    if size is not None:
        parts = list(rows.split(size)) if len(rows) else []
    elif reader.layout == "padded":
        parts = [rows[part] for part in split_rows(prompts + responses, budget)]
    else:
        same = sharing(rollout, rows, responses, reader)
        parts = [rows[part] for part in split_prompts(prompts, responses, same, budget)]
    number = max(1, int(reduce.max(torch.tensor(len(parts)))))
    for i in range(number):
        filled = i < len(parts)
        micro = lay_out(rollout, parts[i], chosen, reader) if filled else empty(reader.device)
        yield micro, i == number - 1
