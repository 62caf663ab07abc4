"""Tiny training runs that several tests share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from lit_rlvr import Batch, RLVRDataModule, RLVRModule, Sampling
from lit_rlvr.tasks import LastDigitArithmetic, Prompt, Score

TINY = "builtin:tiny-qwen3-75k"

FLOAT32_NORMS = {"rtol": 1e-5, "atol": 1e-6}
"""Qwen3's norms compute in float32 whatever the weights. Whether the gradients of responses to one prompt meet
before or behind them depends on how rows are cut: ten or so roundings by 2^-24 of numbers of size 1."""


@dataclass(frozen=True)
class EvenTask(LastDigitArithmetic):
    """Rewards what even random weights do now and then: an even number of characters in the response."""

    def score(self, prompt: Prompt, response: str) -> Score:
        even = len(response) % 2 == 0
        return Score(float(even), even, str(even))


@dataclass(frozen=True)
class HopelessTask(LastDigitArithmetic):
    """Never rewards anything."""

    def score(self, prompt: Prompt, response: str) -> Score:
        return Score(0.0, False)


def whole(tensor: Tensor) -> Tensor:
    """A copy of a tensor, gathered if it is spread over ranks."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


@contextmanager
def learning(module: Any, **options: Any) -> Iterator[list[tuple[str, Any]]]:
    """The parameters of policy and critic by name; of the first FSDP gathered, with ``options``."""
    models = {"": module.policy, "critic.": module.critic}
    with ExitStack() as stack:
        for model in models.values():
            if isinstance(model, FullyShardedDataParallel):
                stack.enter_context(FullyShardedDataParallel.summon_full_params(model, writeback=False, **options))
        named = [
            (prefix + name, p) for prefix, m in models.items() if m is not None for name, p in m.named_parameters()
        ]
        yield [(name.replace("_fsdp_wrapped_module.", ""), parameter) for name, parameter in named]


class Recorder(Callback):
    """Keeps every step's gradient and metrics, and the last weights."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, Tensor]] = []
        self.metrics: list[dict[str, float]] = []
        self.weights: dict[str, Tensor] = {}

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        with learning(pl_module, with_grads=True) as named:
            self.gradients.append({name: whole(p.grad) for name, p in named if p.grad is not None})

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        self.metrics.append(dict(pl_module.step_metrics))

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        with learning(pl_module) as named:
            self.weights = {name: whole(p) for name, p in named}


def tiny_module(**options: Any) -> RLVRModule:
    """A float64 policy with random weights, 4 prompts x 4 responses, two updates per phase."""
    defaults: dict[str, Any] = {
        "dtype": "float64",
        "batch": Batch(prompts=4, responses=4, minibatch_prompts=2),
        "sampling": Sampling(max_new_tokens=12),
        "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
    }
    return RLVRModule(TINY, **{**defaults, **options})


def tiny_trainer(steps: int, callbacks: list[Callback], **options: Any) -> pl.Trainer:
    """A quiet Trainer on the CPU."""
    return pl.Trainer(
        max_steps=steps,
        callbacks=callbacks,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=any(isinstance(c, Checkpoint) for c in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        **options,
    )


def train(module: RLVRModule, steps: int, *callbacks: Callback, task: Any = None, **options: Any) -> Recorder:
    """Train ``module`` for ``steps`` optimiser steps and return what was recorded."""
    recorder = Recorder()
    trainer = tiny_trainer(steps, [*callbacks, recorder], **options)
    trainer.fit(module, datamodule=RLVRDataModule(task or EvenTask()))
    return recorder
