"""Warm start: supervised training on a task's demonstrations, cached by a hash of everything that shapes the result."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from filelock import FileLock
from torch import Tensor

from lit_rlvr.data import Template
from lit_rlvr.layout import Reader
from lit_rlvr.microbatch import lay_out
from lit_rlvr.models import cache_folder, resolve_model, save_model
from lit_rlvr.policy import load_policy
from lit_rlvr.tasks import Task
from lit_rlvr.types import RolloutBatch

log = logging.getLogger(__name__)

FORMAT = 2
"""Raised whenever the same settings would give other weights."""


@dataclass(frozen=True)
class Warmup:
    """Supervised cold start on the task's demonstrations, before reinforcement learning.

    Args:
        steps: Optimiser steps.
        batch_size: Demonstrations per step.
        lr: Peak learning rate of AdamW.
        lr_warmup: Steps of linear warm-up; a cosine to 5 % of the peak follows.
        weight_decay: Weight decay.
        seed: Seed of the order and of the demonstrations.

    Raises:
        ValueError: When a number is out of range.
    """

    steps: int = 700
    batch_size: int = 32
    lr: float = 4e-3
    lr_warmup: int = 30
    weight_decay: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"warmup.{name} must be at least 1, got {value}")
        for name, least in (("lr_warmup", self.lr_warmup), ("weight_decay", self.weight_decay)):
            if least < 0:
                raise ValueError(f"warmup.{name} must be at least 0, got {least}")
        if self.lr <= 0:
            raise ValueError(f"warmup.lr must be > 0, got {self.lr}")
        if self.lr_warmup > self.steps:
            raise ValueError(
                f"warmup.lr_warmup {self.lr_warmup} is more than warmup.steps {self.steps}; lower lr_warmup, as in "
                f"--warmup.lr_warmup={self.steps // 10}"
            )

    def rate(self, step: int) -> float:
        """Share of the peak learning rate at optimiser step ``step`` (from 0).

        >>> [round(Warmup(steps=100, lr_warmup=10).rate(i), 3) for i in (0, 9, 10, 55, 100)]
        [0.1, 1.0, 1.0, 0.525, 0.05]
        """
        if step < self.lr_warmup:
            return (step + 1) / self.lr_warmup
        progress = (step - self.lr_warmup) / max(self.steps - self.lr_warmup, 1)
        return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))

    def fingerprint(self, model: str, task: Task, template: Template, dtype: str) -> str:
        """A hash of everything that shapes the result."""
        files = sorted(Path(model).glob("*.safetensors")) if Path(model).is_dir() else []
        facts = {
            "files": [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files],
            "format": FORMAT, "warmup": asdict(self), "model": model, "dtype": dtype, "template": asdict(template),
            "task": [type(task).__module__, type(task).__qualname__, task.demonstration_facts()],
            "torch": torch.__version__,
        }  # fmt: skip
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]

    def run(self, model: str, task: Task, template: Template = Template(), dtype: str = "float32") -> Path:
        """Warm-start ``model`` on ``task`` and return its folder; nothing is trained when it is in the cache.

        Args:
            model: Folder, hub name or built-in model.
            task: A task with demonstrations.
            template: How a question becomes the model's input.
            dtype: Dtype of the weights.

        Raises:
            ValueError: When the task has no demonstrations.
        """
        folder = cache_folder() / f"warm-{self.fingerprint(model, task, template, dtype)}"
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if (folder / "done").exists():
                log.info("warm start: taken from the cache, %s", folder)
            else:
                self._train(model, task, template, dtype, folder)
                (folder / "done").touch()
        return folder

    def _train(self, model: str, task: Task, template: Template, dtype: str, folder: Path) -> None:
        from transformers import AutoTokenizer

        source = resolve_model(model)
        tokenizer = AutoTokenizer.from_pretrained(source)
        module = WarmupModule(self, source, dtype)
        demonstrations = Demonstrations(self, task, template, tokenizer)
        trainer = pl.Trainer(
            max_steps=self.steps, accelerator="auto", devices=1, logger=False, enable_checkpointing=False,
            enable_model_summary=False, gradient_clip_val=1.0, use_distributed_sampler=False, barebones=False,
            enable_progress_bar=False,
        )  # fmt: skip
        log.info("warm start: %d steps of %d demonstrations", self.steps, self.batch_size)
        trainer.fit(module, demonstrations)
        save_model(module.policy.hf, tokenizer, folder)


class Demonstrations:
    """Batches of demonstrations, as rollouts with nothing but tokens; prompts shuffled, epoch after epoch."""

    def __init__(self, warmup: Warmup, task: Task, template: Template, tokenizer: Any) -> None:
        self.warmup, self.task, self.template, self.tokenizer = warmup, task, template, tokenizer

    def __len__(self) -> int:
        return self.warmup.steps

    def __iter__(self) -> Iterator[RolloutBatch]:
        rng, prompts = random.Random(self.warmup.seed), list(self.task.prompts("train"))
        order: list[Any] = []
        for _ in range(self.warmup.steps):
            while len(order) < self.warmup.batch_size:
                order += rng.sample(prompts, len(prompts))
            batch, order = order[: self.warmup.batch_size], order[self.warmup.batch_size :]
            pairs = []
            for prompt in batch:
                response = self.tokenizer(self.task.demonstrate(prompt, rng), add_special_tokens=False)["input_ids"]
                tokens = self.template.encode(prompt, self.tokenizer).tokens
                pairs.append((list(tokens), [*response, self.tokenizer.eos_token_id]))
            yield demonstrations_to_batch(pairs)


def demonstrations_to_batch(pairs: list[tuple[list[int], list[int]]]) -> RolloutBatch:
    """Right-padded prompts and responses; everything that a rollout has beside tokens is zero."""
    prompt_ids, prompt_mask = _pad([p for p, _ in pairs])
    response_ids, response_mask = _pad([r for _, r in pairs])
    rows, zeros = len(pairs), torch.zeros(response_ids.shape)
    return RolloutBatch(
        prompt_ids, prompt_mask, response_ids, response_mask, zeros, zeros, torch.zeros(rows), torch.zeros(rows),
        torch.arange(rows), torch.zeros(rows, 3, dtype=torch.int64), torch.zeros(rows, dtype=torch.bool),
    )  # fmt: skip


def _pad(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    lengths = torch.tensor([len(r) for r in rows])
    return torch.tensor([[*r, *[0] * (width - len(r))] for r in rows]), torch.arange(width)[None] < lengths[:, None]


class WarmupModule(pl.LightningModule):
    """Maximum likelihood on demonstrations: the selected head with every response token."""

    def __init__(self, warmup: Warmup, model: str, dtype: str) -> None:
        super().__init__()
        self.warmup, self.policy = warmup, load_policy(model, dtype)

    def training_step(self, batch: RolloutBatch, batch_idx: int) -> Tensor:
        rows = torch.arange(len(batch))
        micro = lay_out(batch.to("cpu"), rows, batch.response_mask.cpu(), Reader(self.device))
        tokens = len(micro.targets)

        def likelihood(logprobs: Tensor, entropies: Tensor, part: slice) -> Tensor:
            return -logprobs.sum() / tokens

        loss: Tensor = self.policy(micro.ids, micro.index, micro.targets, 1.0, likelihood)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: RolloutBatch, batch_idx: int) -> None:
        done = batch_idx + 1
        if done % max(1, self.warmup.steps // 8) == 0:
            log.info("warm start: step %d of %d, loss %.3f", done, self.warmup.steps, float(outputs["loss"]))

    def configure_optimizers(self) -> Any:
        w = self.warmup
        optimizer = torch.optim.AdamW(self.policy.parameters(), lr=w.lr, betas=(0.9, 0.98), weight_decay=w.weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, w.rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
