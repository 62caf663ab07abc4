"""Saving the trained policy, and the best one on the way."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn

from lit_rlvr.near import did_you_mean


class SavePolicy(Callback):
    """At the end of training, writes policy and tokenizer as a Hugging Face folder.

    With ``monitor`` the best policy that an evaluation during training found is kept beside it, in a folder of the same
    name with ``_best`` behind it.

    Args:
        folder: Where to; null: ``policy`` in the trainer's ``default_root_dir``.
        monitor: Metric of the evaluations that says which policy is best, as in ``val/sampled/mean_at_1``; null: only
            the last policy is kept.
        mode: Whether ``max`` or ``min`` of the metric is best.

    Raises:
        ValueError: For an unknown mode, one without a metric, or a metric that is not of an evaluation.
    """

    def __init__(
        self, folder: str | None = None, monitor: str | None = None, mode: Literal["max", "min"] = "max"
    ) -> None:
        if mode not in ("max", "min"):
            raise ValueError(f"SavePolicy.mode must be max or min, got {mode!r}")
        if monitor is None and mode != "max":
            raise ValueError("SavePolicy.mode is about SavePolicy.monitor, which is null")
        if monitor is not None and not monitor.startswith("val/"):
            raise ValueError(f"SavePolicy.monitor is a metric like val/sampled/mean_at_1, got {monitor!r}")
        self.folder, self.monitor, self.mode = folder, monitor, mode
        self.saved: Path | None = None
        self.best: float | None = None
        self.best_step: int | None = None

    def place(self, trainer: pl.Trainer) -> Path:
        """The folder of the last policy."""
        return Path(self.folder or Path(trainer.default_root_dir) / "policy")

    def place_of_best(self, trainer: pl.Trainer) -> Path:
        """The folder of the best policy."""
        last = self.place(trainer)
        return last.with_name(f"{last.name}_best")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Keep the policy if none was better; every rank decides the same, for metrics are those of all ranks."""
        if self.monitor is None or trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        if self.monitor not in trainer.callback_metrics:
            known = [name for name in trainer.callback_metrics if name.startswith("val/")]
            hint = did_you_mean(self.monitor, known) or f"; there are {', '.join(known)}"
            raise ValueError(f"SavePolicy.monitor: no evaluation has the metric {self.monitor!r}{hint}")
        value = float(trainer.callback_metrics[self.monitor])
        if value != value or (self.best is not None and not self._better(value, self.best)):
            return
        self.best, self.best_step = value, trainer.global_step
        best = self.place_of_best(trainer)
        fresh = pl_module.save_policy(best.with_name(f"{best.name}.new"))
        if trainer.is_global_zero:  # whoever is interrupted here has one of the two whole
            shutil.rmtree(best, ignore_errors=True)
            fresh.rename(best)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.saved = pl_module.save_policy(self.place(trainer))

    def state_dict(self) -> dict[str, Any]:
        return {} if self.monitor is None else {"best": self.best, "best_step": self.best_step, "monitor": self.monitor}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict.get("monitor") == self.monitor:  # of another metric, it would be no measure
            self.best, self.best_step = state_dict.get("best"), state_dict.get("best_step")

    def _better(self, value: float, than: float) -> bool:
        return value > than if self.mode == "max" else value < than


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def inventory(folder: Path) -> dict[str, Any]:
    """Where a folder is, with the size and the SHA-256 of each of its files."""
    files = {}
    for file in sorted(f for f in folder.rglob("*") if f.is_file()):
        with file.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        files[file.relative_to(folder).as_posix()] = {"bytes": file.stat().st_size, "sha256": digest}
    return {"folder": str(folder.resolve()), "files": files}
