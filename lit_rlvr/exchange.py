"""Sharing a phase's groups between ranks: whole groups, the same mini-batches whatever the number of ranks."""

from __future__ import annotations

import torch

from lit_rlvr.reduce import Reduce
from lit_rlvr.types import RolloutBatch


def plan(draws: list[list[int]], wanted: int, minibatches: int) -> dict[int, tuple[int, int]]:
    """Decide which groups are used, in which mini-batch, and on which rank.

    The first ``wanted`` groups in drawing order are used, cut into ``minibatches`` runs of that order; within a
    mini-batch ranks get equal shares as far as possible, and a group stays where it was sampled if there is room.

    Args:
        draws: For each rank, the draws (group numbers) that it sampled and kept.
        wanted: Most groups to use.
        minibatches: Number of mini-batches.

    Returns:
        {draw: (mini-batch, rank)}.

    >>> plan([[0, 2], [1, 3]], wanted=4, minibatches=2)
    {0: (0, 0), 1: (0, 1), 2: (1, 0), 3: (1, 1)}
    >>> plan([[0, 2, 4, 6], []], wanted=4, minibatches=2)
    {0: (0, 0), 2: (0, 1), 4: (1, 0), 6: (1, 1)}
    """
    home = {draw: rank for rank, own in enumerate(draws) for draw in own}
    used = sorted(home)[:wanted]
    placed: dict[int, tuple[int, int]] = {}
    for number in range(minibatches):
        start, stop = (len(used) * i // minibatches for i in (number, number + 1))
        members = used[start:stop]
        held = [sum(home[draw] == rank for draw in members) for rank in range(len(draws))]
        fullest_first = sorted(range(len(draws)), key=lambda rank: (-held[rank], rank))
        room = [len(members) // len(draws)] * len(draws)
        for rank in fullest_first[: len(members) % len(draws)]:
            room[rank] += 1
        movers = []
        for draw in members:
            if room[home[draw]]:
                room[home[draw]] -= 1
                placed[draw] = (number, home[draw])
            else:
                movers.append(draw)
        for draw in movers:
            rank = next(r for r, free in enumerate(room) if free)
            room[rank] -= 1
            placed[draw] = (number, rank)
    return dict(sorted(placed.items()))


def share_groups(
    own: RolloutBatch, wanted: int, minibatches: int, reduce: Reduce
) -> tuple[RolloutBatch, torch.Tensor, int]:
    """Bring every group to the rank that :func:`plan` gives it; only groups that change rank travel.

    Args:
        own: The groups that this rank sampled and kept, on the CPU.
        wanted: Most groups to use, over all ranks.
        minibatches: Number of mini-batches.
        reduce: The exchange.

    Returns:
        This rank's groups in drawing order, the mini-batch of each row [B], and how many groups were left over.
    """
    draws: list[list[int]] = reduce.gather(own.group.unique().tolist())
    placed = plan(draws, wanted, minibatches)
    leaving = {d for d in draws[reduce.rank] if d in placed and placed[d][1] != reduce.rank}
    moves = any(placed[d][1] != rank for rank, have in enumerate(draws) for d in have if d in placed)
    parts = [own]
    if moves:
        travelling = own.rows(_rows_of(own, leaving))
        parts += [part for rank, part in enumerate(reduce.gather(travelling)) if rank != reduce.rank]
    everything = RolloutBatch.concatenate(parts)
    mine = everything.rows(_rows_of(everything, {d for d, (_, rank) in placed.items() if rank == reduce.rank}))
    order = torch.argsort(mine.group, stable=True)
    mine = mine.rows(order)
    number = torch.tensor([placed[int(d)][0] for d in mine.group], dtype=torch.int64)
    return mine, number, sum(map(len, draws)) - len(placed)


def _rows_of(rollout: RolloutBatch, draws: set[int]) -> torch.Tensor:
    return torch.tensor([i for i, d in enumerate(rollout.group.tolist()) if d in draws], dtype=torch.int64)
