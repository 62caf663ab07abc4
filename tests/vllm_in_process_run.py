"""Trains three phases with a vLLM in each of two processes; test_vllm_in_process.py starts it with torchrun."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from ddp_run import STRATEGIES
from lightning.pytorch.callbacks import Callback
from runs import tiny_trainer
from vllm_runs import LongPrompts, distance, make_module

from lit_rlvr import RLVRDataModule
from lit_rlvr.engines import VLLMInProcessEngine
from lit_rlvr.policy import load_policy
from lit_rlvr.scoring import score


class Distances(Callback):
    """How far the training model, and the one that it began with, are from this rank's vLLM."""

    def __init__(self, folder: str) -> None:
        self.start = load_policy(folder)
        self.now: list[float] = []
        self.moved: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch.minibatch == 0:
            rollout = pl_module.phase.rollout
            self.now.append(distance(rollout, rollout.old_logprobs))
            self.moved.append(distance(rollout, score(self.start, rollout, 1.0, 4096)[0]))


def main(strategy: str, folder: str, out: Path) -> None:
    """Saves what each rank saw, and a sum over the ranks once vLLM has ended."""
    options = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256, "gpu_memory_utilization": 0.2}
    module, distances = make_module(folder, VLLMInProcessEngine(options), 1.0), Distances(folder)
    kind = STRATEGIES[strategy]("plain")
    trainer = tiny_trainer(6, [distances], devices=2, strategy=kind, use_distributed_sampler=False)
    trainer.fit(module, datamodule=RLVRDataModule(LongPrompts()))
    total = torch.tensor(1 + dist.get_rank())
    dist.all_reduce(total)
    seen = {"now": distances.now, "moved": distances.moved, "sum": int(total)}
    torch.save(seen, out / f"{dist.get_rank()}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
