"""lit-rlvr's side: training steps of RLVRModule, as the command line runs them but for files and progress bars."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lit_rlvr_callbacks import EntropyTopK

from benchmarks.gate import Gate
from benchmarks.models import questions
from benchmarks.settings import Settings
from lit_rlvr import Batch, RLVRDataModule, RLVRModule, Sampling
from lit_rlvr.engines import InProcessEngine
from lit_rlvr.tasks import Prompt, Score, Task


def reward(text: str) -> float:
    """A number in [0, 1) that depends on the whole response, so that no group has equal rewards."""
    return zlib.crc32(text.encode()) % 1000 / 1000


@dataclass(frozen=True)
class Benchmark(Task):
    """Random prompts with random rewards."""

    texts: tuple[str, ...]
    isolated = False

    def prompts(self, split: str) -> Sequence[Prompt]:
        return [Prompt(i, text) for i, text in enumerate(self.texts)]

    def score(self, prompt: Prompt, response: str) -> Score:
        value = reward(response)
        return Score(value, value > 0.5)


class Gated(Callback):
    """Lets each training step wait at the gate; Lightning calls callbacks before the module."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self.gate()


def main(settings: Settings) -> None:
    """Run steps until the parent says stop."""
    size = settings.size
    pl.seed_everything(0, verbose=False)
    gate = Gate(settings.device)
    module = RLVRModule(
        settings.folder,
        dtype="float32" if settings.device == "cpu" else "bfloat16",
        batch=Batch(prompts=size.prompts, responses=size.responses, micro_tokens=settings.micro_tokens),
        sampling=Sampling(max_new_tokens=size.new_tokens),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-6, fused=True),
        engine=InProcessEngine(**settings.engine),
        **settings.module,
    )
    gate.wrap(module.engine, "generate", "rollout")
    callbacks: list[Callback] = [Gated(gate)]
    if settings.rho < 1:
        callbacks.append(EntropyTopK(rho=settings.rho))
    task = Benchmark(tuple(questions(size, 64 * size.prompts)))
    trainer = pl.Trainer(
        accelerator=settings.device if settings.device == "cpu" else "gpu",
        devices=1, max_steps=10_000, callbacks=callbacks, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=0,
        gradient_clip_val=1.0, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=RLVRDataModule(task))


if __name__ == "__main__":
    main(Settings.read(sys.argv[1]))
