"""RLVRModule: reinforcement learning with verifiable rewards, one optimiser step per ``training_step``.

A rollout phase samples ``prompts x responses`` answers and verifies them; the credit callbacks decide which of their
tokens learn, and how much; then ``epochs x mini-batches`` optimiser steps maximise

    sum(weight * surrogate(advantage, pi / pi_old)) / denominator  -  beta * KL(pi || pi_ref)

with sums over a whole mini-batch and all ranks. :func:`lit_rlvr.phase.run_phase` makes a phase,
:meth:`RLVRModule.training_step` is an optimiser step, and :mod:`lit_rlvr.objective` is its loss, token by token.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, replace
from functools import cached_property
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel

from lit_rlvr.advantages import Advantage, GroupNormalized
from lit_rlvr.aggregation import Aggregation, TokenMean
from lit_rlvr.ahead import LookAhead
from lit_rlvr.allocator import keep_freed_memory
from lit_rlvr.checkpoint import Hyperparameters, configured_again, hyperparameters
from lit_rlvr.checks import check_algorithm, check_chain, check_trainer
from lit_rlvr.collect import Collector
from lit_rlvr.credit import CreditCallback, CreditContext, all_callbacks, credit_chain, describe_chain, penalises
from lit_rlvr.critic import Critic, value_losses
from lit_rlvr.data import RLVRDataModule, Ticket
from lit_rlvr.engines import Engine, InProcessEngine, Sampling
from lit_rlvr.kl import KLPenalty
from lit_rlvr.learning import backward_but_last, policy_losses
from lit_rlvr.lora import LoRA
from lit_rlvr.losses import ClippedSurrogate, PolicyLoss
from lit_rlvr.meter import Meter
from lit_rlvr.minibatch import MiniBatch
from lit_rlvr.optimizing import clip_apart, gradient_norms, parameter_groups, said_about
from lit_rlvr.phase import Phase, run_phase
from lit_rlvr.policy import Policy
from lit_rlvr.reduce import Reduce, default_reduce, on_every_rank
from lit_rlvr.refine import of_mini_batch
from lit_rlvr.run_models import RunModels
from lit_rlvr.scoring import autocast_of
from lit_rlvr.settings import Batch, Evaluation
from lit_rlvr.shaping import DynamicSampling, OverlongPenalty

log = logging.getLogger(__name__)


class RLVRModule(RunModels):
    """Policy, reference and algorithm.

    Args:
        model: Hugging Face folder or hub name of the policy, ``gguf:PATH`` of a GGUF file (PATH may begin with the name
            of an installed package that holds it), or ``builtin:tiny-qwen3-75k``.
        dtype: Dtype of the weights: ``float32``, ``bfloat16`` or ``float64``.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, more time.
        lora: Adapters to train instead of the weights; null: train all weights.
        batch: Sizes of a rollout phase and of its optimiser steps.
        sampling: How rollouts are drawn: always from the full distribution.
        engine: Engine that samples the rollouts; null: InProcessEngine.
        overlap: Draw the next phase's rollouts while the current phase's are learnt from, with weights that are one
            phase old: for a vLLM server with devices of its own, together with the callback TruncatedImportance.
        advantage: Base advantage of a response, or with a critic of a token.
        critic: A value model beside the policy, for ``advantage: GAE``; null: none.
        loss: Surrogate objective of a token: ClippedSurrogate (PPO, GRPO, DAPO), GSPO or CISPO.
        aggregation: How tokens are averaged: TokenMean, SequenceMean (in each response first) or ConstantLength.
        kl: Penalty for leaving the reference model, as in ``kl.beta``; null: no reference model is loaded.
        reference: Folder or name of the reference model; null: the same as ``model``, with ``lora`` the policy itself
            with its adapters off.
        overlong: Penalty on the reward of responses near the length limit; null: none.
        dynamic_sampling: Keep only groups that are neither all right nor all wrong; null: keep every group.
        optimizer: Makes the optimizer from the parameters.
        scheduler: Makes a learning-rate scheduler from the optimizer; stepped once per optimiser step.
        evaluations: What ``validate`` and ``test`` report, by name; null: one sampled response at temperature 1.
        seed: Fixes the order of prompts, rollouts and random choices.

    Raises:
        ValueError: When options do not go together.
    """

    def __init__(
        self,
        model: str,
        dtype: str = "float32",
        gradient_checkpointing: bool = False,
        lora: LoRA | None = None,
        batch: Batch = Batch(),
        sampling: Sampling = Sampling(),
        engine: Engine | None = None,
        overlap: bool = False,
        advantage: Advantage = GroupNormalized(),
        critic: Critic | None = None,
        loss: PolicyLoss = ClippedSurrogate(),
        aggregation: Aggregation = TokenMean(),
        kl: KLPenalty | None = None,
        reference: str | None = None,
        overlong: OverlongPenalty | None = None,
        dynamic_sampling: DynamicSampling | None = None,
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=1e-6, weight_decay=0.1),
        scheduler: LRSchedulerCallable | None = None,
        evaluations: dict[str, Evaluation] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(evaluations or {"sampled": Evaluation(max_new_tokens=sampling.max_new_tokens)})
        self.model, self.dtype_name, self.gradient_checkpointing = model, dtype, gradient_checkpointing
        self.lora = lora
        self.batch, self.sampling, self.engine = batch, sampling, engine or InProcessEngine()
        self.advantage, self.critic_settings, self.loss, self.aggregation = advantage, critic, loss, aggregation
        self.kl, self.reference_path, self.overlong = kl, reference, overlong
        self.dynamic_sampling, self.optimizer, self.scheduler, self.seed = dynamic_sampling, optimizer, scheduler, seed
        self.ahead = LookAhead() if overlap else None
        self.base: str | None = None
        self.phase: Phase | None = None
        self.skipped_steps = 0
        self.policy: Any = None
        self.critic: Any = None
        self.step_metrics: dict[str, float] = {}
        self._metrics: dict[str, float] = {}
        self.ctx: CreditContext
        self._mini: MiniBatch
        self._meter: Meter
        self._configured: Hyperparameters
        object.__setattr__(self, "reference", None)
        check_algorithm(self)

    # -- the algorithm -------------------------------------------------------------------------------------------------

    def on_train_batch_start(self, batch: Ticket, batch_idx: int) -> None:
        """Run a rollout phase when its first optimiser step is due, and take the step's mini-batch."""
        if batch.minibatch == 0:
            with autocast_of(self.trainer):
                self.phase = run_phase(self, batch.phase, self.reduce)
            self._metrics = dict(self.phase.metrics)
        if self.phase is None:
            raise RuntimeError(
                f"the checkpoint was taken inside rollout phase {batch.phase}, whose rollouts it does not hold; resume "
                f"from one at a multiple of {self.batch.steps_per_phase} optimiser steps"
            )
        mini = self.phase.minibatches[batch.minibatch % self.batch.minibatches]
        moved = batch.minibatch > 0
        if not moved:
            # Still the old policy: a ratio of 1, whatever rounding makes of it. A penalty on |log ratio| has no
            # gradient there, but one of full size and random sign an epsilon beside it.
            mini = replace(mini, own_old=True)
        self.ctx = self.phase.context(self.trainer.global_step)
        with autocast_of(self.trainer):
            self._mini = of_mini_batch(self, mini, self.ctx, moved=moved)

    def training_step(self, batch: Ticket, batch_idx: int) -> Tensor:
        """One optimiser step on one mini-batch, micro-batch by micro-batch.

        Every micro-batch's loss is divided by the denominator of the *whole* mini-batch over all ranks, so gradients do
        not depend on how rows are cut. Lightning runs the last backward pass, clips and steps.
        """
        self.trainer.optimizers[0].zero_grad()
        self._meter = Meter()
        loss = backward_but_last(policy_losses(self, self._mini, self._meter))
        if self.critic is not None:
            loss = loss + backward_but_last(value_losses(self, self._mini, self._meter))
        return loss

    def on_after_backward(self) -> None:
        """Read what was measured, now that a GPU has been asked for the whole step."""
        self._metrics |= self._meter.read(self.reduce) | self.ctx.metrics

    def optimizer_zero_grad(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: Lightning would zero after ``training_step``, which begins with zeroing and accumulates."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Step, unless no token of any rank learns: weight decay and momentum would still move the weights."""
        about_all = self.kl_loss is not None or self.critic is not None or penalises(self.chain)
        if self._mini.denominator or (about_all and self._mini.sequences):
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        else:
            optimizer_closure()
            self.skipped_steps += 1
        self._metrics["train/lr"] = self.trainer.optimizers[0].param_groups[0]["lr"]
        self._metrics["train/skipped_steps"] = float(self.skipped_steps)
        # Here rather than at the batch's end, where callbacks may save a checkpoint before it.
        self.emit(self._metrics, self.trainer.global_step + 1)
        self.step_metrics, self._metrics = self._metrics, {}

    # -- around it -----------------------------------------------------------------------------------------------------

    @property
    def chain(self) -> list[CreditCallback]:
        """The credit callbacks of the trainer, in order."""
        return credit_chain(all_callbacks(self.trainer))

    @property
    def separable(self) -> bool:
        """Whether the loss is a sum over tokens whose credit is known before the forward pass."""
        return not self.loss.whole_responses and all(c.scope != "micro_batch" for c in self.chain)

    @property
    def kl_loss(self) -> KLPenalty | None:
        """The KL penalty, if it is part of the loss rather than of the reward."""
        return self.kl if self.kl is not None and self.kl.where == "loss" else None

    @cached_property
    def reduce(self) -> Reduce:
        """Reductions over the ranks of this run."""
        return default_reduce(self.device)

    @cached_property
    def collector(self) -> Collector:
        """Samples and verifies the groups of a phase."""
        verifier = self.data.verifier
        return Collector(
            self.engine, verifier, self.tokenizer, self.sampling, self.batch.responses, self.dynamic_sampling, self.seed
        )

    @property
    def data(self) -> RLVRDataModule:
        """The trainer's data module.

        Raises:
            ValueError: When there is none, or one of another kind.
        """
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, RLVRDataModule):
            raise ValueError("RLVRModule needs an RLVRDataModule: trainer.fit(module, datamodule=RLVRDataModule(task))")
        return data

    def setup(self, stage: str) -> None:
        if stage == "fit":
            check_trainer(self, self.trainer)
            check_chain(self)
            log.info(describe_chain(self.chain))
            if self.trainer.strategy.root_device.type == "cpu":
                keep_freed_memory()
        on_every_rank(self.engine.setup, default_reduce(self.trainer.strategy.root_device))

    def configure_callbacks(self) -> list[Callback]:
        return [] if self.ahead is None else [self.ahead]

    def teardown(self, stage: str) -> None:
        self.engine.close()

    def configure_optimizers(self) -> Any:
        with said_about("model.optimizer"):
            optimizer = self.optimizer(parameter_groups(self.policy, self.critic, self.critic_settings))
        with said_about("model.scheduler"):
            schedule = {} if self.scheduler is None else {"scheduler": self.scheduler(optimizer), "interval": "step"}
        self._configured = hyperparameters(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": schedule} if schedule else optimizer

    def on_train_start(self) -> None:
        schedulers = [config.scheduler for config in self.trainer.lr_scheduler_configs]
        configured_again(self.trainer.optimizers[0], schedulers, self._configured)
        self.policy.train()
        if self.critic is not None:
            self.critic.train()
        if isinstance(self.reference, Policy):
            self.place(self.reference)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self._metrics |= gradient_norms(optimizer, self.pieces)

    @property
    def pieces(self) -> Reduce | None:
        """What adds over ranks where gradients are plain tensors that hold this rank's pieces; else None."""
        return self.reduce if isinstance(self.policy, FullyShardedDataParallel) else None

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip policy and critic apart: the critic's gradients are of another size, and would shrink the policy's."""
        if (self.critic is None and self.pieces is None) or gradient_clip_algorithm == "value":
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_val:
            clip_apart(optimizer, gradient_clip_val, self.pieces)

    def on_train_batch_end(self, outputs: Any, batch: Ticket, batch_idx: int) -> None:
        if batch.minibatch == self.batch.steps_per_phase - 1:
            self.trainer.optimizers[0].zero_grad()  # gradients would only take memory during the next rollouts

    # -- saving --------------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["skipped_steps"] = self.skipped_steps
        checkpoint["policy"] = {"model": self.model, "lora": None if self.lora is None else asdict(self.lora)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.skipped_steps = checkpoint["skipped_steps"]
