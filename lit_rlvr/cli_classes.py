"""The classes that YAML and the command line may name."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import Strategy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lit_rlvr.advantages import Advantage
from lit_rlvr.aggregation import Aggregation
from lit_rlvr.engines import Engine
from lit_rlvr.losses import PolicyLoss
from lit_rlvr.rewards import Reward
from lit_rlvr.tasks import Task

NAMEABLE: dict[str, tuple[type, ...]] = {
    "trainer.callbacks": (Callback,),
    "trainer.logger": (Logger,),
    "trainer.strategy": (Strategy,),
    "model.optimizer": (Optimizer,),
    "model.scheduler": (LRScheduler,),
    "model.advantage": (Advantage,),
    "model.loss": (PolicyLoss,),
    "model.aggregation": (Aggregation,),
    "model.engine": (Engine,),
    "data.task": (Task,),
    "data.task.rewards": (Reward,),
}
"""Bases of the classes that YAML names, by the option that takes them."""
HIDDEN = {
    "BaseFinetuning", "BasePredictionWriter", "Callback", "Checkpoint", "CovarianceCallback", "CreditCallback",
    "DummyLogger", "LRScheduler", "LookAhead", "Optimizer", "ProgressBar", "SaveConfig", "SaveConfigCallback",
}  # fmt: skip
"""Classes that are bases of others, or that the command line adds by itself: naming one would do nothing."""


def class_names(bases: Iterable[type]) -> list[str]:
    """Short names of all imported subclasses of ``bases``."""
    names: set[str] = set()
    todo: list[Any] = list(bases)
    while todo:
        cls = todo.pop()
        todo += [c for c in cls.__subclasses__() if c.__name__ not in names]
        if not cls.__name__.startswith("_") and not inspect.isabstract(cls):
            names.add(cls.__name__)
    return sorted(names - HIDDEN)


def names_by_option() -> dict[str, list[str]]:
    """The short names of all imported classes, by the option that takes them."""
    return {option: class_names(bases) for option, bases in NAMEABLE.items()}
