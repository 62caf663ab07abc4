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
from transformers import AutoTokenizer

from benchmarks.gate import Gate
from benchmarks.models import prompt_ids, questions, responses
from benchmarks.settings import Settings
from lit_rlvr import Batch, RLVRDataModule, RLVRModule, Sampling
from lit_rlvr.engines import Engine, Generation, InProcessEngine
from lit_rlvr.policy import load_policy
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


class Given(Engine):
    """Responses that are there already, with random entropies: what is left of a step is training.

    Args:
        settings: Says which responses, and on which device.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings, self.number = settings, 0

    def exact(self, precision: str) -> bool:
        return InProcessEngine().exact(precision)

    def generate(self, *args: Any, **kwargs: Any) -> Generation:
        rows = responses(self.settings.size, self.number, self.settings.ends)
        generator = torch.Generator().manual_seed(self.number)
        self.number += 1
        lengths, width = torch.tensor([len(row) for row in rows]), max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        mask = torch.arange(width) < lengths[:, None]
        entropies = torch.rand(ids.shape, generator=generator) * mask
        made = (ids, mask, -entropies, entropies, lengths == self.settings.size.new_tokens)
        return Generation(*(tensor.to(self.settings.device) for tensor in made))


class Gated(Callback):
    """Lets each training step wait at the gate; Lightning calls callbacks before the module."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self.gate()


def module_of(settings: Settings) -> RLVRModule:
    """The module that is measured."""
    size = settings.size
    engine = Given(settings) if settings.work == "train" else InProcessEngine(**settings.engine)
    batch = {"micro_tokens": settings.micro_tokens, **settings.batch}
    return RLVRModule(
        settings.folder,
        dtype=settings.dtype,
        batch=Batch(prompts=size.prompts, responses=size.responses, **batch),
        sampling=Sampling(max_new_tokens=size.new_tokens),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-6, fused=True),
        engine=engine,
        **settings.module,
    )


def fit(settings: Settings, module: RLVRModule, callbacks: list[Callback], max_steps: int) -> None:
    """Train, with as many of the tokens as the settings say."""
    if settings.rho < 1:
        callbacks = [*callbacks, EntropyTopK(rho=settings.rho, select=settings.select)]
    task = Benchmark(tuple(questions(settings.size, 64 * settings.size.prompts)))
    trainer = pl.Trainer(
        accelerator="cpu" if settings.device == "cpu" else "gpu",
        devices=1, max_steps=max_steps, callbacks=callbacks, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=0,
        gradient_clip_val=1.0, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=RLVRDataModule(task))


def count(generation: Generation) -> int:
    """Tokens of the responses."""
    return int(generation.mask.sum())


def rollouts(settings: Settings, gate: Gate) -> None:
    """Sample with the engine alone."""
    size = settings.size
    policy = load_policy(settings.folder, settings.dtype, layout=None).to(settings.device)
    tokenizer = AutoTokenizer.from_pretrained(settings.folder)
    engine, prompts = InProcessEngine(**settings.engine), prompt_ids(size, 64 * size.prompts)
    engine.setup()
    gate.wrap(engine, "generate", "rollout", count)
    grid = torch.cartesian_prod(torch.arange(size.prompts), torch.arange(size.responses))

    def work(number: int) -> None:
        first = number % 64 * size.prompts
        uid = torch.cat([torch.full((size.rows, 1), number), grid], dim=1)
        sampling = Sampling(max_new_tokens=size.new_tokens)
        engine.generate(policy, tokenizer, prompts[first : first + size.prompts], uid, sampling, seed=0)

    gate.repeat(work)


def main(settings: Settings) -> None:
    """Run steps until the parent says stop."""
    pl.seed_everything(0, verbose=False)
    gate = Gate(settings.device)
    if settings.work == "rollout":
        rollouts(settings, gate)
    module = module_of(settings)
    gate.wrap(module.engine, "generate", "rollout", count)
    fit(settings, module, [Gated(gate)], max_steps=10_000)


if __name__ == "__main__":
    main(Settings.read(sys.argv[1]))
