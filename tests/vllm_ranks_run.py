"""Trains three phases on two servers without a model; test_vllm_ranks.py starts it with torchrun."""

from __future__ import annotations

import sys

import torch
from ddp_run import STRATEGIES
from lightning.pytorch.callbacks import Callback
from lit_rlvr_callbacks import TruncatedImportance
from runs import EvenTask, tiny_module, tiny_trainer

from lit_rlvr import Batch, RLVRDataModule
from lit_rlvr.engines import VLLMServerEngine
from lit_rlvr.lora import LoRA


def train_on(strategy: object, devices: int, addresses: list[str], how: str) -> None:
    """Two optimiser steps per phase; the engine is asked by every rank."""
    overlap = how == "overlap"
    module = tiny_module(
        batch=Batch(4, 4, 2, micro_tokens=60), engine=VLLMServerEngine(addresses), optimizer=step_by_the_gradient,
        overlap=overlap, lora=LoRA() if how == "lora" else None,
    )  # fmt: skip
    callbacks: list[Callback] = [TruncatedImportance()] if overlap else []
    trainer = tiny_trainer(6, callbacks, devices=devices, strategy=strategy, use_distributed_sampler=False)
    trainer.fit(module, datamodule=RLVRDataModule(EvenTask()))


def step_by_the_gradient(parameters: object) -> torch.optim.Optimizer:
    """Plain gradient descent: Adam would turn a gradient's rounding into a step where a gradient is nearly 0."""
    return torch.optim.SGD(parameters, lr=0.1)  # type: ignore[arg-type]


if __name__ == "__main__":
    torch.set_num_threads(1)
    train_on(STRATEGIES[sys.argv[1]]("plain"), 2, sys.argv[3:], sys.argv[2])
