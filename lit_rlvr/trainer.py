"""The trainer of the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from lit_rlvr.data import RLVRDataModule
from lit_rlvr.module import RLVRModule


class RLVRTrainer(pl.Trainer):
    """Lightning Trainer options."""

    def fit(
        self,
        model: Any,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: Any = None,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Train a policy.

        Args:
            model: The module.
            train_dataloaders: As of Lightning's Trainer.
            val_dataloaders: As of Lightning's Trainer.
            datamodule: The data module.
            ckpt_path: Checkpoint of a run to go on from; null: begin.
            weights_only: Read plain values and tensors alone from the checkpoint, which is all that one of ours holds;
                null: true.
        """
        super().fit(model, train_dataloaders, val_dataloaders, datamodule, ckpt_path, weights_only)

    def validate(
        self,
        model: Any = None,
        dataloaders: Any = None,
        ckpt_path: str | Path | None = None,
        verbose: bool = True,
        datamodule: Any = None,
        weights_only: bool | None = None,
    ) -> Any:
        """Evaluate on held-out validation problems.

        Args:
            model: The module.
            dataloaders: As of Lightning's Trainer.
            ckpt_path: Checkpoint whose policy is evaluated; null: ``model.model``.
            verbose: Print the results.
            datamodule: The data module.
            weights_only: Read plain values and tensors alone from the checkpoint, which is all that one of ours holds;
                null: true.
        """
        return super().validate(model, dataloaders, ckpt_path, verbose, datamodule, weights_only)

    def test(
        self,
        model: Any = None,
        dataloaders: Any = None,
        ckpt_path: str | Path | None = None,
        verbose: bool = True,
        datamodule: Any = None,
        weights_only: bool | None = None,
    ) -> Any:
        """Evaluate on held-out test problems.

        Args:
            model: The module.
            dataloaders: As of Lightning's Trainer.
            ckpt_path: Checkpoint whose policy is evaluated; null: ``model.model``.
            verbose: Print the results.
            datamodule: The data module.
            weights_only: Read plain values and tensors alone from the checkpoint, which is all that one of ours holds;
                null: true.
        """
        return super().test(model, dataloaders, ckpt_path, verbose, datamodule, weights_only)

    def explain(self, model: RLVRModule, datamodule: RLVRDataModule, cluster: str | None = None) -> None:
        """Print what a run would do: steps, tokens, algorithm, credit chain and memory; no weights are loaded.

        Args:
            model: The module.
            datamodule: The data module.
            cluster: Estimate the time of a phase on machines like 8x8xH100 (nodes, devices of each, kind), with a
                sharded strategy, from stated ceilings; null: no estimate.
        """

    def doctor(self, model: RLVRModule, datamodule: RLVRDataModule) -> None:
        """Check machine, configuration, model, task and verifier in seconds; no weights are loaded."""

    def warmup(self, model: RLVRModule, datamodule: RLVRDataModule) -> None:
        """Warm-start the policy on the task's demonstrations and print the folder that holds it."""
