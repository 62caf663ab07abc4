"""Runs that are asked to leave their machine: a checkpoint at the end of the rollout phase, and a way to go on."""

from __future__ import annotations

import logging
import signal
import threading
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lit_rlvr.checkpoint import PhaseCheckpoint

log = logging.getLogger(__name__)

EXIT_CODE = 75
"""Of the first rank's process, in place of 0: "try again" among the exit codes of Unix. The others end with 0."""
MARKER = "stopped"
"""A file beside the checkpoints, with the signal's name, from when a run has been stopped until it goes on.

Launchers of several processes hide exit codes.
"""


class Preemption(Callback):
    """On a signal, ends the run after its rollout phase with a checkpoint, from which it resumes bit for bit.

    A signal to any process is enough: all of them agree at the end of every phase. The run then ends with exit code 75,
    leaves a file ``stopped`` beside its checkpoints, and prints how to go on. More signals change nothing; Ctrl-C and
    SIGKILL still end it at once.

    It takes the place of Lightning's own handlers, which end a run inside a phase, and of its requeueing under SLURM: a
    batch script requeues a job that has left the file, as ``examples/multi_node/`` does.

    Args:
        signals: Names of signals; none: they do what they would do without this callback.

    Raises:
        ValueError: For an unknown signal.
    """

    def __init__(self, signals: list[str] = ["SIGTERM", "SIGUSR1"]) -> None:  # noqa: B006
        known = signal.Signals.__members__
        if unknown := [name for name in signals if name not in known]:
            raise ValueError(f"Preemption.signals: there is no signal {unknown[0]!r}; SIGTERM and SIGUSR1 are usual")
        self.signals = [known[name] for name in signals]
        self.received: signal.Signals | None = None
        self.agreed: signal.Signals | None = None

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Keep Lightning from requeueing a job and from saving inside a phase.

        Raises:
            ValueError: When nothing saves checkpoints.
        """
        if stage != "fit" or not self.signals:
            return
        checkpoints_of(trainer)
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment):
            environment.auto_requeue = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Install the handlers, after Lightning has installed its own; it puts the original ones back at the end."""
        if self.signals and trainer.is_global_zero:
            (checkpoints_of(trainer).where(trainer) / MARKER).unlink(missing_ok=True)
        if threading.current_thread() is threading.main_thread():
            for number in self.signals:
                signal.signal(number, self._note)

    def _note(self, number: int, frame: Any) -> None:
        if self.received is None:
            self.received = signal.Signals(number)
            log.warning("%s received: the run ends with a checkpoint after this rollout phase", self.received.name)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """At the end of a phase, agree on whether to stop; the checkpoint comes after all other callbacks."""
        finished = 0 < trainer.max_steps <= trainer.global_step
        if batch.minibatch < pl_module.batch.steps_per_phase - 1 or finished or not self.signals:
            return
        number = int(pl_module.reduce.max(torch.tensor(self.received or 0)))
        if number:
            self.agreed = signal.Signals(number)
            checkpoints_of(trainer).due = True

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._stop(trainer, pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._stop(trainer, pl_module)

    def _stop(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """End the run if that has been agreed on; its checkpoint has been saved."""
        if self.agreed is None:
            return
        pl_module.teardown("fit")  # Lightning leaves it out when a run ends by an exception
        pl_module.data.teardown("fit")
        if not trainer.is_global_zero:
            raise SIGTERMException(0)
        last = checkpoints_of(trainer).where(trainer) / "last.ckpt"
        steps, name = trainer.global_step, self.agreed.name
        last.with_name(MARKER).write_text(f"{name}\n")
        log.warning(
            "stopped by %s after %d optimiser steps; the same command with --ckpt_path=%s goes on", name, steps, last
        )
        raise SIGTERMException(EXIT_CODE)


def checkpoints_of(trainer: pl.Trainer) -> PhaseCheckpoint:
    """What saves the trainer's checkpoints.

    Raises:
        ValueError: When nothing does.
    """
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, PhaseCheckpoint):
            return callback
    raise ValueError("Preemption saves by PhaseCheckpoint, which is not among the callbacks")
