"""Credit callbacks: Lightning callbacks that decide which tokens learn, and how much.

A credit callback gets facts and the credit so far, and returns new credit. Most act once per rollout phase, on all of
its responses; what a paper defines on the policy as it is being trained acts on every mini-batch or micro-batch. The
drivers run the chain in the order of the trainer's callback list: :func:`observe`, :func:`shape_rewards` and
:func:`assign_credit` in a phase, :func:`assign_credit` again and :func:`penalties` in an optimiser step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lit_rlvr.blame import blame
from lit_rlvr.credit_laws import check_credit, check_rewards, check_shape, unchanged
from lit_rlvr.near import did_you_mean
from lit_rlvr.reduce import LocalReduce, Reduce
from lit_rlvr.schedule import Schedule
from lit_rlvr.types import Credit, Current, RolloutBatch, Tokens

if TYPE_CHECKING:
    from lit_rlvr.module import RLVRModule

STAGES = ("rising", "plateau")
"""Stages of training, in order. Source: Deng et al. 2025 (arXiv 2508.02260)."""

Scope = Literal["phase", "mini_batch", "micro_batch"]
"""On what a callback acts: all responses of a phase, those of an optimiser step, or those of a forward pass."""


@dataclass
class CreditContext:
    """What a credit callback may know beside the rollout.

    Args:
        step: Rollout phases begun before this one; schedules and windows count these.
        update: Optimiser steps taken so far.
        stage: The current stage, or None where no detector is in the chain.
        reduce: The only road to a collective; every rank makes the same calls.
        seed: The run's seed, for choices at random.
        current: What the current policy says of the responses, for callbacks that declare ``reads_current``.
        metrics: What goes to the log; fill it with :meth:`log`.
    """

    step: int = 0
    update: int = 0
    stage: str | None = None
    reduce: Reduce = field(default_factory=LocalReduce)
    seed: int = 0
    current: Current | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    _prefix: str = ""
    _times: dict[str, int] = field(default_factory=dict)
    _logged: set[str] = field(default_factory=set)

    def log(self, name: str, value: float) -> None:
        """Log a number as ``credit/<callback>/<name>``; it must be the same on every rank.

        A callback that acts on each of several micro-batches logs the mean over them.

        Raises:
            ValueError: When the callback has logged that name already.
        """
        key = f"{self._prefix}{name}"
        if key in self._logged:
            raise ValueError(f"the metric {key} is logged twice in one phase")
        self._logged.add(key)
        times = self._times[key] = self._times.get(key, 0) + 1
        before = self.metrics.get(key, 0.0)
        self.metrics[key] = before + (float(value) - before) / times

    def enter(self, callback: CreditCallback) -> None:
        """Log under the name of ``callback`` from now on."""
        self._prefix = f"credit/{callback.state_key}/"

    def leave(self) -> None:
        """One round of the chain is over: names may be logged again, for the mean."""
        self._logged.clear()


class CreditCallback(Callback):
    """Base class of all credit callbacks; each method's default changes nothing.

    Five attributes say what the loop must do for a callback; set them on the class or in ``__init__``:

    * ``scope``: what :meth:`assign` is called on. Below ``phase`` every optimiser step calls it; ``micro_batch`` needs
      ``batch.micro_rows``, because what it decides depends on which responses share a forward pass.
    * ``reads_current``: :meth:`assign` reads ``ctx.current``. On a mini-batch that costs a scoring pass.
    * ``own_denominator``: on a micro-batch, divide by the micro-batch's own count times its share of the sequences,
      because :meth:`assign` changes ``count`` there.
    * ``token_level``: tokens of one response may get different credit, which a sequence-level loss cannot honour.
    * ``corrects_engine``: weighs tokens by the training model's probability over the engine's, so that the engine's
      weights may be older ones.

    Args:
        stages: Act only in these stages (``rising``, ``plateau``); null: always. Needs a stage detector in the list.
        name: Name in logs and checkpoints; null: the class name. Two of one class need two names.

    Raises:
        ValueError: For an unknown stage.
    """

    scope: Scope = "phase"
    reads_current: bool = False
    own_denominator: bool = False
    token_level: bool = True
    corrects_engine: bool = False

    def __init__(self, stages: list[str] | None = None, name: str | None = None) -> None:
        super().__init__()
        for stage in stages or ():
            if stage not in STAGES:
                hint = did_you_mean(stage, STAGES) or f"; known are {', '.join(STAGES)}"
                raise ValueError(f"there is no stage {stage!r}{hint}")
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

    def check(self, module: RLVRModule) -> None:
        """Refuse options of the run that do not go with this callback, before anything is trained.

        Raises:
            ValueError: Saying what to change.
        """

    def shape_rewards(self, rollout: RolloutBatch, rewards: Tensor, ctx: CreditContext) -> Tensor:
        """Return new rewards [B], from which the base advantage is taken. Pure, once per phase.

        Args:
            rollout: The phase's facts on this rank; groups are whole.
            rewards: What the callbacks before this one made of the rewards [B].
            ctx: Step, stage, reductions and metrics.
        """
        return rewards

    def assign(self, credit: Credit, rollout: RolloutBatch, ctx: CreditContext) -> Credit:
        """Return new credit. Pure: the same arguments and state give the same result, and no argument changes.

        Args:
            credit: What the callbacks before this one decided.
            rollout: The facts on this rank of the phase, mini-batch or micro-batch, as ``scope`` says; in a phase and
                in a mini-batch groups are whole.
            ctx: Step, stage, reductions and metrics.
        """
        return credit

    def penalty(self, tokens: Tokens, ctx: CreditContext) -> Tensor | None:
        """Return what to add to the loss of each token [m], differentiable; None: nothing.

        It is averaged over all response tokens by the algorithm's own rule. Called on any number of tokens at a time,
        so each token's penalty may depend on that token alone, and nothing may be logged or reduced.

        Args:
            tokens: Response tokens under the current policy.
            ctx: Step and stage.
        """
        return None

    def acts(self, ctx: CreditContext) -> bool:
        """Whether the current stage is one of the callback's."""
        return not self.stages or ctx.stage in self.stages


def all_callbacks(trainer: Trainer) -> list[Callback]:
    """A trainer's callbacks, in list order."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector, never declared
    return callbacks


def credit_chain(callbacks: Sequence[Callback]) -> list[CreditCallback]:
    """The credit callbacks of a trainer, in list order, after checking that they go together.

    Raises:
        ValueError: For two callbacks of one name, two detectors, or something that goes by stage without a detector.
    """
    chain = [c for c in callbacks if isinstance(c, CreditCallback)]
    names = [c.state_key for c in chain]
    if twice := {n for n in names if names.count(n) > 1}:
        raise ValueError(
            f"two credit callbacks are named {min(twice)}; give each its own `name` to have both. `callbacks+` adds to "
            "the list so far: to replace that, write `callbacks`, or empty it first, as in --trainer.callbacks=[] "
            "--config FILE"
        )
    detectors = [c.state_key for c in chain if type(c).stage is not CreditCallback.stage]
    if len(detectors) > 1:
        raise ValueError(f"{' and '.join(detectors)} both name the stage; keep one stage detector")
    gated = [c.state_key for c in chain if c.stages]
    if gated and not detectors:
        raise ValueError(
            f"{gated[0]} acts only in some stages, but no stage detector is in the list; add StageDetector"
        )
    for callback in chain:
        staged = [option for option, v in vars(callback).items() if isinstance(v, Schedule) and v.by_stage]
        if staged and not detectors:
            option = f"{callback.state_key}.{staged[0]}"
            raise ValueError(f"{option} goes by stage, but no stage detector is in the list; add StageDetector")
    return chain


def describe_chain(chain: Sequence[CreditCallback]) -> str:
    """The chain in one line.

    >>> describe_chain([])
    'credit: every response token learns'
    """
    links = [f"{c.state_key}[{'|'.join(c.stages)}]" if c.stages else c.state_key for c in chain]
    return "credit: " + (" → ".join(links) or "every response token learns")


def observe(chain: Sequence[CreditCallback], rollout: RolloutBatch, ctx: CreditContext) -> None:
    """Let all callbacks look at a phase's rollout, then write the stage into ``ctx``.

    Raises:
        ValueError: When a callback breaks the protocol or raises; the message names it.
    """
    for callback in chain:
        with unchanged(callback.state_key, rollout), _hook(callback, "observe", ctx):
            callback.observe(rollout, ctx)
    ctx.stage = None
    for callback in chain:
        with _hook(callback, "stage", ctx):
            ctx.stage = callback.stage() if ctx.stage is None else ctx.stage


def shape_rewards(chain: Sequence[CreditCallback], rollout: RolloutBatch, ctx: CreditContext) -> Tensor:
    """The rewards [B] after every callback whose stage it is, in order.

    Raises:
        ValueError: When a callback breaks the protocol or raises; the message names it.
    """
    rewards = rollout.rewards
    for callback in chain:
        if callback.acts(ctx):
            with unchanged(callback.state_key, rollout, rewards), _hook(callback, "shape_rewards", ctx):
                rewards = callback.shape_rewards(rollout, rewards, ctx)
            check_rewards(rewards, rollout.rewards, callback.state_key)
    return rewards


def assign_credit(
    chain: Sequence[CreditCallback],
    rollout: RolloutBatch,
    credit: Credit,
    ctx: CreditContext,
    scope: Scope = "phase",
) -> Credit:
    """Run the callbacks of one scope whose stage it is, in order.

    Raises:
        ValueError: When a callback breaks the protocol or raises; the message names it.
    """
    for callback in chain:
        if callback.scope != scope or not callback.acts(ctx):
            continue
        with unchanged(callback.state_key, rollout, credit), _hook(callback, "assign", ctx):
            before, credit = credit, callback.assign(credit, rollout, ctx)
        check_credit(credit, before, rollout.response_mask, callback.state_key)
        if scope == "micro_batch" and not callback.own_denominator and not torch.equal(before.count, credit.count):
            raise ValueError(f"{callback.state_key} changes `count` on a micro-batch without own_denominator = True")
    ctx.leave()
    return credit


def penalises(chain: Sequence[CreditCallback]) -> bool:
    """Whether a callback of the chain adds to the loss of every response token."""
    return any(type(c).penalty is not CreditCallback.penalty for c in chain)


def penalties(chain: Sequence[CreditCallback], tokens: Tokens, ctx: CreditContext) -> Tensor:
    """The sum of the callbacks' penalties, per token [m].

    Raises:
        ValueError: When a callback breaks the protocol or raises; the message names it.
    """
    total = torch.zeros_like(tokens.logprobs)
    for callback in chain:
        if not callback.acts(ctx):
            continue
        with blame(callback, "penalty", callback.state_key):
            added = callback.penalty(tokens, ctx)
        if added is not None:
            check_shape(added, total, f"{callback.state_key} returned from penalty")
            total = total + added
    return total


@contextmanager
def _hook(callback: CreditCallback, method: str, ctx: CreditContext) -> Iterator[None]:
    """While ``method`` of ``callback`` runs: what it logs has its name, and so has an error."""
    ctx.enter(callback)
    with blame(callback, method, callback.state_key):
        yield
