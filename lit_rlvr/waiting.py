"""How long the processes of a run wait for each other.

They meet after every round of sampling, and a rank whose responses are short, or which has no prompt in a round that
dynamic sampling adds, is there long before the others: with responses of 20,480 tokens by more than the half hour that
``torch.distributed`` waits.
"""

from __future__ import annotations

from datetime import timedelta

from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry

HOURS = 6.0
"""Unless the configuration says something else."""


def time_limit(hours: float) -> timedelta:
    """The option ``timeout_hours`` of a strategy, as ``torch.distributed`` wants it.

    Raises:
        ValueError: Unless it is a time.
    """
    if not 0 < hours < float("inf"):
        raise ValueError(f"trainer.strategy.timeout_hours must be above 0, and is a number of hours; got {hours}")
    return timedelta(hours=hours)


def let_ddp_wait() -> None:
    """Have DDP wait as long where it is asked for by a name: ``strategy: ddp`` and its kin, or ``auto``.

    For the process of the command line: it changes what Lightning makes of these names. ``DDPStrategy`` itself has an
    option ``timeout``.
    """
    for entry in StrategyRegistry.values():
        if entry["strategy"] is DDPStrategy:
            entry["init_params"].setdefault("timeout", time_limit(HOURS))
