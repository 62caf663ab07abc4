"""What loggers other than MLflow are told: settings, facts of the run, and sample rollouts where they take texts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from typing import Any

import lightning.pytorch as pl
from jsonargparse import Namespace
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

NEEDS = {
    "CometLogger": ("comet_ml",),
    "TensorBoardLogger": ("tensorboard", "tensorboardX"),
    "WandbLogger": ("wandb",),
}
"""Packages that Lightning's loggers want, one of each; none is a dependency of this package."""
COLUMNS = ("question", "response", "answer", "reward", "correct")


def check_packages(loggers: Any) -> None:
    """Refuse loggers whose package is not installed.

    Args:
        loggers: ``trainer.logger`` of a configuration: an entry, a list of them, or a bool.

    Raises:
        ValueError: With the command that installs it.
    """
    for entry in loggers if isinstance(loggers, list) else [loggers]:
        name = entry["class_path"].rpartition(".")[2] if isinstance(entry, Mapping | Namespace) else ""
        packages = NEEDS.get(name, ())
        if packages and not any(map(find_spec, packages)):
            raise ValueError(f"trainer.logger: {name} needs the package {packages[0]}: pip install {packages[0]}")


def others(trainer: pl.Trainer, of_ours: type[Logger]) -> list[Logger]:
    """The trainer's loggers but those of the kind ``of_ours``, on the first rank; none elsewhere."""
    return [x for x in trainer.loggers if not isinstance(x, of_ours)] if trainer.is_global_zero else []


def log_settings(loggers: Iterable[Logger], settings: Mapping[str, Any]) -> None:
    """Tell loggers settings by dotted name, as hyper-parameters."""
    for logger in loggers:
        logger.log_hyperparams(dict(settings))


def log_rollouts(loggers: Iterable[Logger], rows: list[dict[str, Any]], step: int) -> None:
    """Show rollouts in loggers that show texts: a table in Weights & Biases, Markdown in TensorBoard.

    Args:
        loggers: Any loggers.
        rows: One response each, as :func:`lit_rlvr.rollout_pages.rollout_rows` makes them.
        step: Optimiser steps so far.
    """
    cells = [[row[name] for name in COLUMNS] for row in rows]
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.log_table("rollouts", columns=list(COLUMNS), data=cells, step=step)
        elif isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text("rollouts", markdown(cells), step)


def markdown(cells: list[list[Any]]) -> str:
    r"""A Markdown table of ``COLUMNS``.

    >>> print(markdown([["1+1?", "a|b", "2", 1.0, True]]))
    | question | response | answer | reward | correct |
    |---|---|---|---|---|
    | 1+1? | a\|b | 2 | 1.0 | True |
    """
    lines = [COLUMNS, *([str(cell).replace("|", r"\|").replace("\n", "<br>") for cell in row] for row in cells)]
    head, *body = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([head, "|" + "---|" * len(COLUMNS), *body])
