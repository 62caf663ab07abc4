"""Saving the trained policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback


class SavePolicy(Callback):
    """At the end of training, writes policy and tokenizer as a Hugging Face folder.

    Args:
        folder: Where to; null: ``policy`` in the trainer's ``default_root_dir``.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.folder = folder
        self.saved: Path | None = None

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.saved = pl_module.save_policy(self.folder or Path(trainer.default_root_dir) / "policy")
