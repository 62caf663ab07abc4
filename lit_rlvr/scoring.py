"""Log-probabilities and entropies of finished responses, without gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lit_rlvr.microbatch import empty, lay_out, split_rows
from lit_rlvr.reduce import LocalReduce, Reduce
from lit_rlvr.types import RolloutBatch


@torch.no_grad()
def score(
    policy: Any,
    rollout: RolloutBatch,
    temperature: float,
    budget: int,
    reduce: Reduce | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies [B, T] of the responses under ``policy``; 0 off the mask.

    Args:
        policy: A :class:`~lit_rlvr.policy.Policy`.
        rollout: The responses, on the CPU.
        temperature: Sampling temperature.
        budget: Tokens per forward pass.
        reduce: Equalises the number of forward passes over ranks, which a sharded policy needs.
    """
    logprobs, entropies = (torch.zeros_like(rollout.response_mask, dtype=torch.float32) for _ in range(2))
    parts = split_rows(rollout.prompt_mask.sum(-1) + rollout.lengths, budget)
    passes = int((reduce or LocalReduce()).max(torch.tensor(len(parts))))
    for number in range(passes):
        if number < len(parts):
            micro = lay_out(rollout, parts[number], rollout.response_mask, policy.device)
        else:
            micro = empty(policy.device)
        logp, entropy = policy(micro.ids, micro.index, micro.targets, temperature)
        where = (micro.row.cpu(), micro.column.cpu())
        logprobs[where], entropies[where] = logp.float().cpu(), entropy.float().cpu()
    return logprobs, entropies
