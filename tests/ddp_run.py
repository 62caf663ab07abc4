"""Trains a few steps and saves gradients, metrics and choices: started by test_ddp.py with one process or with two."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from lit_rlvr_callbacks import EntropyTopK, PerplexityShaping
from runs import EvenTask, Recorder, tiny_module, tiny_trainer

from lit_rlvr import Batch, RLVRDataModule
from lit_rlvr.kl import KLPenalty
from lit_rlvr.shaping import DynamicSampling


def main(devices: int, folder: Path, case: str) -> None:
    """Run ``case`` on ``devices`` processes and write what each recorded."""
    torch.set_num_threads(1)
    options = {
        "plain": {},
        "kl": {"kl": KLPenalty(beta=0.5)},
        "dynamic": {"dynamic_sampling": DynamicSampling(3)},
        "ragged": {"batch": Batch(prompts=3, responses=4, minibatch_prompts=1, micro_tokens=40)},
    }[case]
    module, recorder = tiny_module(**{"batch": Batch(4, 4, 2, micro_tokens=60), **options}), Recorder()
    trainer = tiny_trainer(
        6,
        [PerplexityShaping(0.3), EntropyTopK(0.1), recorder],
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        gradient_clip_val=0.5,
    )
    trainer.fit(module, datamodule=RLVRDataModule(EvenTask()))
    skip = ("time/", "rollout/tokens_per_s")
    metrics = [{n: v for n, v in step.items() if not n.startswith(skip)} for step in recorder.metrics]
    torch.save((recorder.gradients, metrics), folder / f"{devices}_{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
