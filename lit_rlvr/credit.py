"""Credit callbacks: Lightning callbacks that decide which tokens learn, and how much.

A credit callback gets the facts of a rollout phase and the credit so far, and returns new credit. The driver
:func:`assign_credit` runs the chain once per phase, in the order of the trainer's callback list.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lit_rlvr.reduce import LocalReduce, Reduce
from lit_rlvr.types import Credit, RolloutBatch

STAGES = ("rising", "plateau")
"""Stages of training, in order. Source: Deng et al. 2025 (arXiv 2508.02260)."""


@dataclass
class CreditContext:
    """What a credit callback may know beside the rollout.

    Args:
        step: Rollout phases begun before this one; schedules and windows count these.
        update: Optimiser steps taken so far.
        stage: The current stage, or None where no detector is in the chain.
        reduce: The only road to a collective; every rank makes the same calls.
        seed: The run's seed, for choices at random.
        metrics: What goes to the log; fill it with :meth:`log`.
    """

    step: int = 0
    update: int = 0
    stage: str | None = None
    reduce: Reduce = field(default_factory=LocalReduce)
    seed: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    _prefix: str = ""

    def log(self, name: str, value: float) -> None:
        """Log a number as ``credit/<callback>/<name>``; it must be the same on every rank.

        Raises:
            ValueError: When the callback has logged that name already.
        """
        key = f"{self._prefix}{name}"
        if key in self.metrics:
            raise ValueError(f"the metric {key} is logged twice in one phase")
        self.metrics[key] = float(value)


class CreditCallback(Callback):
    """Base class of all credit callbacks; each method's default changes nothing.

    Args:
        stages: Act only in these stages (``rising``, ``plateau``); null: always. Needs a stage detector in the list.
        name: Name in logs and checkpoints; null: the class name. Two of one class need two names.

    Raises:
        ValueError: For an unknown stage.
    """

    def __init__(self, stages: list[str] | None = None, name: str | None = None) -> None:
        super().__init__()
        for stage in stages or ():
            if stage not in STAGES:
                near = difflib.get_close_matches(stage, STAGES, n=1)
                hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(STAGES)}"
                raise ValueError(f"there is no stage {stage!r}; {hint}")
        self.stages = stages
        self.name = name or type(self).__name__

    @property
    def state_key(self) -> str:
        """The key of the callback's state in a checkpoint."""
        return self.name

    def observe(self, rollout: RolloutBatch, ctx: CreditContext) -> None:
        """Look at a phase's rollout; the only place where the callback's state may change."""

    def stage(self) -> str | None:
        """The stage that training is in; detectors return it, everything else None."""
        return None

    def assign(self, credit: Credit, rollout: RolloutBatch, ctx: CreditContext) -> Credit:
        """Return new credit. Pure: the same arguments and state give the same result, and no argument changes.

        Args:
            credit: What the callbacks before this one decided.
            rollout: The phase's facts on this rank; groups are whole.
            ctx: Step, stage, reductions and metrics.
        """
        return credit


def all_callbacks(trainer: Trainer) -> list[Callback]:
    """A trainer's callbacks, in list order."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector, never declared
    return callbacks


def credit_chain(callbacks: Sequence[Callback]) -> list[CreditCallback]:
    """The credit callbacks of a trainer, in list order, after checking that they go together.

    Raises:
        ValueError: For two callbacks of one name, two detectors, or ``stages`` without a detector.
    """
    chain = [c for c in callbacks if isinstance(c, CreditCallback)]
    names = [c.state_key for c in chain]
    if twice := {n for n in names if names.count(n) > 1}:
        raise ValueError(f"two credit callbacks are named {twice.pop()}; give each its own `name`")
    detectors = [c.state_key for c in chain if type(c).stage is not CreditCallback.stage]
    if len(detectors) > 1:
        raise ValueError(f"{' and '.join(detectors)} both name the stage; keep one stage detector")
    gated = [c.state_key for c in chain if c.stages]
    if gated and not detectors:
        raise ValueError(
            f"{gated[0]} acts only in some stages, but no stage detector is in the list; add StageDetector"
        )
    return chain


def describe_chain(chain: Sequence[CreditCallback]) -> str:
    """The chain in one line.

    >>> describe_chain([])
    'credit: every response token learns'
    """
    links = [f"{c.state_key}[{'|'.join(c.stages)}]" if c.stages else c.state_key for c in chain]
    return "credit: " + (" → ".join(links) or "every response token learns")


def assign_credit(chain: Sequence[CreditCallback], rollout: RolloutBatch, credit: Credit, ctx: CreditContext) -> Credit:
    """Run the chain: all observe, then each whose stage it is acts, in order.

    Raises:
        ValueError: When a callback breaks the protocol; the message names it.
    """
    for callback in chain:
        ctx._prefix = f"credit/{callback.state_key}/"
        callback.observe(rollout, ctx)
    ctx.stage = next((stage for c in chain if (stage := c.stage()) is not None), None)
    for callback in chain:
        if callback.stages and ctx.stage not in callback.stages:
            continue
        ctx._prefix = f"credit/{callback.state_key}/"
        credit = callback.assign(credit, rollout, ctx)
        if not isinstance(credit, Credit):
            raise ValueError(f"{callback.state_key} returned {type(credit).__name__} from assign, expected a Credit")
        check_credit(credit, rollout.response_mask, callback.state_key)
    return credit


def check_credit(credit: Credit, mask: Tensor, author: str) -> None:
    """Check the laws of credit.

    Raises:
        ValueError: Naming ``author`` and the broken law.
    """
    for name in ("advantage", "weight", "count"):
        value: Tensor = getattr(credit, name)
        if value.shape != mask.shape:
            raise ValueError(f"{author} returned {name} of shape {tuple(value.shape)}, expected {tuple(mask.shape)}")
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{author} returned a {name} that is not finite")
        if name == "advantage":
            continue
        if bool((value < 0).any()):
            raise ValueError(f"{author} returned a negative {name}")
        if bool(((value != 0) & ~mask).any()):
            raise ValueError(f"{author} returned a {name} other than 0 outside the response")
