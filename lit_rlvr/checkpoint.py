"""Checkpoints at phase boundaries, from which a run resumes bit for bit, and the configuration's say on resume."""

from __future__ import annotations

import logging
import time
import zipfile
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch.optim import Optimizer

from lit_rlvr.fsdp1 import FSDP1Strategy

log = logging.getLogger(__name__)


class PhaseCheckpoint(Checkpoint):
    """Saves everything that a run needs to go on, at the end of rollout phases.

    They are called ``phase_000010.ckpt`` and so on, after as many phases, and ``last.ckpt`` is a link to the newest.
    Each is a file; under a sharded strategy, unless it is told otherwise, a folder with the part of every process.
    Resume with ``lit-rlvr fit --config ... --ckpt_path=runs/NAME/checkpoints/last.ckpt``.

    Args:
        every: Most rollout phases between two checkpoints.
        keep: Newest checkpoints to keep; older ones are deleted.
        folder: Where to; null: ``checkpoints`` in the trainer's ``default_root_dir``.
        at_end: Save at the end of training too, so that a finished run can be extended.
        minutes: At the end of a phase, save as well when so many minutes have passed since the last checkpoint, so that
            of phases that take hours each is saved; null: only ``every`` counts.

    Raises:
        ValueError: When a number is below 1, or ``minutes`` not above 0.
    """

    def __init__(
        self,
        every: int = 20,
        keep: int = 2,
        folder: str | None = None,
        at_end: bool = True,
        minutes: float | None = 30.0,
    ) -> None:
        if every < 1 or keep < 1:
            raise ValueError(f"PhaseCheckpoint.every and keep must be at least 1, got {every} and {keep}")
        if minutes is not None and not minutes > 0:
            raise ValueError(f"PhaseCheckpoint.minutes must be above 0, or null for no limit, got {minutes}")
        self.every, self.keep, self.folder, self.at_end, self.minutes = every, keep, folder, at_end, minutes
        self.due = False
        """Save at the end of this phase, whatever its number: the run is about to be stopped."""
        self._saved: list[str] = []
        self._since = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._since = time.monotonic()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        done = batch.phase + 1
        last = batch.minibatch == pl_module.batch.steps_per_phase - 1
        ends = self.at_end and trainer.max_steps > 0 and trainer.global_step >= trainer.max_steps
        if last and (done % self.every == 0 or ends or self.due or self._late(pl_module)):
            self._save(trainer, done)
            self._since = time.monotonic()

    def _late(self, pl_module: Any) -> bool:
        """Whether the last checkpoint is too long ago on any rank; every rank calls it."""
        if self.minutes is None:
            return False
        seconds = float(pl_module.reduce.max(torch.tensor(time.monotonic() - self._since)))
        return seconds >= 60 * self.minutes

    def where(self, trainer: pl.Trainer) -> Path:
        """The folder of the checkpoints."""
        return Path(self.folder or Path(trainer.default_root_dir) / "checkpoints")

    def _save(self, trainer: pl.Trainer, done: int) -> None:
        folder = self.where(trainer)
        path = folder / f"phase_{done:06d}.ckpt"
        self._saved = [*(name for name in self._saved if name != str(path)), str(path)]
        old, self._saved = self._saved[: -self.keep], self._saved[-self.keep :]
        trainer.save_checkpoint(path)
        for name in old:
            trainer.strategy.remove_checkpoint(name)
        if trainer.is_global_zero:
            fresh = folder / ".last.ckpt"
            fresh.unlink(missing_ok=True)
            fresh.symlink_to(path.name)
            fresh.replace(folder / "last.ckpt")  # at once: a kill leaves the old link or the new one

    def state_dict(self) -> dict[str, Any]:
        return {"saved": list(self._saved)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = list(state_dict["saved"])


def check_resumable(path: Path, strategy: Strategy) -> None:
    """Refuse a checkpoint that the strategy cannot read.

    Raises:
        ValueError: Saying what can.
    """
    if not (zipfile.is_zipfile(path) or (path / "meta.pt").is_file()):
        raise ValueError(f"{path} is no checkpoint of a run, or is cut short")
    if path.is_file() and isinstance(strategy, FSDP1Strategy):
        raise ValueError(
            f"{path} is a single file, and PyTorch's first FSDP resumes from folders of shards; add --config "
            "configs/strategy/fsdp.yaml instead"
        )
    if path.is_dir() and not isinstance(strategy, ModelParallelStrategy | FSDP1Strategy):
        raise ValueError(
            f"{path} is a folder of shards, which only a sharded strategy reads: add --config "
            "configs/strategy/fsdp.yaml (one process will do), or begin a run with what `lit-rlvr export` makes of it"
        )


Hyperparameters = list[dict[str, Any]]


def hyperparameters(optimizer: Optimizer) -> Hyperparameters:
    """What the configuration made of each parameter group, the parameters left out."""
    return [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]


def configured_again(optimizer: Optimizer, schedulers: list[Any], fresh: Hyperparameters) -> None:
    """Give a resumed optimizer the configuration's hyper-parameters instead of the checkpoint's, and print changes.

    A changed learning rate scales the scheduled one; everything else is replaced. Equal settings change no bit.

    Args:
        optimizer: The optimizer, restored from a checkpoint.
        schedulers: Its learning-rate schedulers, restored too.
        fresh: :func:`hyperparameters` from before it was restored.
    """
    for number, (group, wanted) in enumerate(zip(optimizer.param_groups, fresh, strict=True)):
        base, wanted_base = (g.get("initial_lr", g["lr"]) for g in (group, wanted))
        if base != wanted_base:
            log.info("resume: lr %s in the checkpoint, %s in the configuration", base, wanted_base)
            group["lr"] *= wanted_base / base
            if "initial_lr" in group:
                group["initial_lr"] = wanted_base
            for scheduler in schedulers:
                scheduler.base_lrs[number] = wanted_base
        for name, value in wanted.items():
            if name not in ("lr", "initial_lr") and group.get(name) != value:
                log.info("resume: %s %s in the checkpoint, %s in the configuration", name, group.get(name), value)
                group[name] = value
