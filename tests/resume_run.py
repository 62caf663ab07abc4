"""Trains with checkpoints, resumes and saves the policy; test_checkpoints.py starts it with torchrun."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from lit_rlvr_callbacks import EntropyTopK, StageDetector
from runs import EvenTask, Recorder, tiny_module, tiny_trainer

from lit_rlvr import RLVRDataModule
from lit_rlvr.checkpoint import PhaseCheckpoint
from lit_rlvr.critic import Critic
from lit_rlvr.fsdp1 import FSDP1Strategy
from lit_rlvr.gae import GAE
from lit_rlvr.kl import KLPenalty
from lit_rlvr.lora import LoRA
from lit_rlvr.saving import SavePolicy
from lit_rlvr.shaping import DynamicSampling
from lit_rlvr.sharding import FSDP2Strategy

HALF, WHOLE = 4, 8
PPO: dict[str, Any] = {"advantage": GAE(), "critic": Critic(lr=1e-2), "dynamic_sampling": None}
KINDS: dict[str, dict[str, Any]] = {"shards": {}, "file": {}, "critic": PPO, "fsdp1": PPO, "offload": PPO}
"""What each kind of run has besides."""
if find_spec("peft"):
    KINDS["lora"] = {"lora": LoRA()}


def fit(folder: Path, steps: int, strategy: Any, devices: int, resume: Path | None = None, **more: Any) -> Recorder:
    """Train up to ``steps``, with everything that has state and a checkpoint after every phase in ``folder``."""
    scheduler = lambda o: torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=6)  # noqa: E731
    options = {"scheduler": scheduler, "dynamic_sampling": DynamicSampling(3)}
    module, recorder = tiny_module(**{**options, "kl": KLPenalty(0.1), **more}), Recorder()
    checkpoints = PhaseCheckpoint(every=1, keep=10, folder=str(folder))
    stage = StageDetector(window=1, patience=2)
    callbacks: list[Callback] = [stage, EntropyTopK(0.3), recorder, checkpoints, SavePolicy(str(folder / "policy"))]
    trainer = tiny_trainer(steps, callbacks, devices=devices, strategy=strategy, gradient_clip_val=0.5)
    trainer.fit(module, datamodule=RLVRDataModule(EvenTask()), ckpt_path=resume, weights_only=True)
    return recorder


def main(folder: Path) -> None:
    """For every kind: run to the end, run to the middle, go on from there."""
    torch.set_num_threads(1)
    for kind, more in KINDS.items():
        strategy: Any = lambda: FSDP2Strategy(save_distributed_checkpoint=kind != "file")  # noqa: B023, E731
        if kind == "fsdp1":
            strategy = FSDP1Strategy
        if kind == "offload":
            strategy = lambda: FSDP2Strategy(cpu_offload=True)  # noqa: E731
        whole = fit(folder / kind / "whole", WHOLE, strategy(), 2, **more)
        fit(folder / kind / "half", HALF, strategy(), 2, **more)
        middle = folder / kind / "half" / "last.ckpt"
        resumed = fit(folder / kind / "resumed", WHOLE, strategy(), 2, middle, **more)
        assert all(torch.equal(whole.weights[name], value) for name, value in resumed.weights.items())
        torch.save(whole.weights, folder / kind / f"weights_{torch.distributed.get_rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
