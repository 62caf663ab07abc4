"""Samples with an engine that fails on one of two processes; test_failures.py starts it with torchrun."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from ddp_run import STRATEGIES
from lightning.pytorch.callbacks import Callback
from runs import EvenTask, tiny_module, tiny_trainer

from lit_rlvr import RLVRDataModule
from lit_rlvr.engines import InProcessEngine
from lit_rlvr.engines.decoding import Output
from lit_rlvr.policy import Policy
from lit_rlvr.reduce import Reduce

CASES = [("fsdp", "train"), ("fsdp1", "train"), *(("ddp", when) for when in ("setup", "train", "validate", "rest"))]
"""Strategies, and what fails; sharded policies are gathered while the engine fails."""


class Fails(InProcessEngine):
    """Runs out of something on rank 1, while rank 0 does what it should; when training, in the second phase."""

    def __init__(self, when: str) -> None:
        super().__init__()
        self.when, self.calls = when, 0

    def _fail(self, when: str, call: int = 1) -> None:
        self.calls += when == self.when
        if when == self.when and self.calls == call and torch.distributed.get_rank() == 1:
            raise MemoryError("no room for 7 rows") if when == "train" else ValueError(f"{when} is too much")

    def setup(self) -> None:
        self._fail("setup")

    def _decode(self, policy: Policy, prompts: Any, samples: int, out: Output) -> None:
        self._fail("train", 2)
        self._fail("validate")
        super()._decode(policy, prompts, samples, out)

    def rest(self, reduce: Reduce) -> None:
        self._fail("rest")


class Steps(Callback):
    """Counts optimiser steps."""

    steps = 0

    def on_train_batch_end(self, *args: Any) -> None:
        self.steps += 1


def outcome(strategy: Any, when: str) -> tuple[str, str, int]:
    """The error that ends a run, its kind, and the optimiser steps before it."""
    module, steps = tiny_module(engine=Fails(when)), Steps()
    trainer = tiny_trainer(6, [steps], devices=2, strategy=strategy, use_distributed_sampler=False)
    trainer.limit_val_batches = 1
    data = RLVRDataModule(EvenTask(), eval_prompts=4)
    try:
        if when == "validate":
            trainer.validate(module, data, verbose=False)
        else:
            trainer.fit(module, datamodule=data)
    except Exception as error:
        return str(error), type(error).__name__, steps.steps
    return "none", "", steps.steps


def main(folder: Path) -> None:
    """Have every run fail, one after the other in the same process group, and write what each rank was told."""
    torch.set_num_threads(1)
    told = {case: outcome(STRATEGIES[case[0]]("plain"), case[1]) for case in CASES}
    torch.save(told, folder / f"{torch.distributed.get_rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
