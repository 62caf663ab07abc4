"""What one optimiser step learns from its mini-batch: the policy's loss, micro-batch by micro-batch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from lit_rlvr.credit import penalises
from lit_rlvr.layout import Reader
from lit_rlvr.meter import Meter
from lit_rlvr.microbatch import MicroBatch, cut
from lit_rlvr.minibatch import MiniBatch
from lit_rlvr.objective import TokenObjective
from lit_rlvr.refine import of_micro_batch
from lit_rlvr.sharding import sync_gradients

if TYPE_CHECKING:
    from lit_rlvr.module import RLVRModule


def policy_losses(module: RLVRModule, mini: MiniBatch, meter: Meter) -> Iterator[tuple[Tensor, bool]]:
    """The policy's loss on each micro-batch; the flag marks the last.

    A loss that is a sum over tokens goes into the forward pass (the selected head). One that needs the current
    policy's view of all tokens before a token's loss is known is taken after it.
    """
    meter.add(rows=float(len(mini.rollout)))
    for micro, last in micro_batches(module, mini):
        meter.add(entered=float(micro.rows), places=float(micro.ids.numel()), padding=float(micro.padding))
        sync_gradients(module.policy, module.trainer.strategy, last)
        tokens = (micro.ids, micro.index, micro.targets)
        score = partial(module.policy, *tokens, module.sampling.temperature, pack=micro.pack)
        if module.separable:
            yield score(token_loss=objective(module, mini, micro, meter)), last
        else:
            logprobs, entropies = score()
            refined = of_micro_batch(module, mini, micro, logprobs, entropies, module.ctx)
            yield objective(module, refined, micro, meter)(logprobs, entropies, slice(None)), last


def objective(module: RLVRModule, mini: MiniBatch, micro: MicroBatch, meter: Meter) -> TokenObjective:
    """The loss of a micro-batch's tokens."""
    scale = module.reduce.world_size  # the strategy averages gradients over the ranks
    return TokenObjective(mini, micro, module.loss, module.kl_loss, module.chain, module.ctx, scale, meter)


def micro_batches(module: RLVRModule, mini: MiniBatch) -> Iterator[tuple[MicroBatch, bool]]:
    """Cut a mini-batch's rows by the token budget, or into ``micro_rows`` rows each; the flag marks the last.

    Only tokens with something to learn are asked for, and rows without any are left out: exact, because their gradient
    is zero. Terms about every response token ask for all of them.
    """
    everything = module.kl_loss is not None or penalises(module.chain) or not module.separable
    chosen = mini.rollout.response_mask if everything else mini.credit.learns
    batch, reader = module.batch, Reader.of(module.policy, module.device)
    return cut(mini.rollout, chosen, batch.micro_tokens, batch.micro_rows, reader, module.reduce)


def backward_but_last(losses: Iterator[tuple[Tensor, bool]]) -> Tensor:
    """Run the backward pass of each loss before the next is made, and return the last."""
    for loss, last in losses:
        if last:
            return loss
        loss.backward()
    raise AssertionError("there is always a last micro-batch")
