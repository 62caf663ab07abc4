"""Log-probabilities and entropies of finished responses, without gradients, and whether an engine gives them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor

from lit_rlvr.layout import Reader
from lit_rlvr.microbatch import cut
from lit_rlvr.reduce import LocalReduce, Reduce
from lit_rlvr.sharding import compute_precision
from lit_rlvr.types import RolloutBatch

if TYPE_CHECKING:
    from lit_rlvr.module import RLVRModule


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
    everything, reduce = rollout.response_mask, reduce or LocalReduce()
    scored = []
    for micro, _ in cut(rollout, everything, budget, None, Reader.of(policy, policy.device), reduce):
        facts = policy(micro.ids, micro.index, micro.targets, temperature, pack=micro.pack)
        scored.append(((micro.row, micro.column), facts))
    for where, (logp, entropy) in scored:  # fetched at the end: a GPU would be idle after every micro-batch
        logprobs[where], entropies[where] = logp.float().cpu(), entropy.float().cpu()
    return logprobs, entropies


def engine_is_exact(module: RLVRModule) -> bool:
    """Whether the engine reports the training forward's own log-probabilities, at the run's dtype and strategy."""
    trainer = module.trainer
    return module.engine.exact(compute_precision(trainer.strategy, module.dtype_name, str(trainer.precision)))


def autocast_of(trainer: Trainer) -> AbstractContextManager[None]:
    """The autocast of a mixed precision, in which training steps run but hooks do not.

    Old log-probabilities that were scored outside of it would be those of another model than the one that learns.
    """
    plugin = trainer.precision_plugin
    return plugin.forward_context() if isinstance(plugin, MixedPrecision) else nullcontext()
