"""The trainer of the command line."""

from __future__ import annotations

import lightning.pytorch as pl

from lit_rlvr.data import RLVRDataModule
from lit_rlvr.module import RLVRModule


class RLVRTrainer(pl.Trainer):
    """Lightning's Trainer with the commands that it lacks."""

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
