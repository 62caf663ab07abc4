"""How long processes wait for each other: what a strategy is told reaches the process group."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from command_line import CONFIGS, TINY, UNTRACKED, succeed
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import FSDPStrategy
from runs import tiny_module, tiny_trainer
from test_sharding import started

from lit_rlvr.fsdp1 import FSDP1Strategy
from lit_rlvr.sharding import FSDP2Strategy
from lit_rlvr.waiting import HOURS, let_ddp_wait


@pytest.fixture(autouse=True)
def no_group() -> Iterator[None]:
    """The process group that a strategy of this process makes ends with the test."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def waits(group: Any = None) -> timedelta:
    """How long a process group does."""
    backend: Any = (group or dist.group.WORLD)._get_backend(torch.device("cpu"))
    limit: timedelta = backend.options._timeout
    return limit


@pytest.mark.parametrize("strategy", [FSDP2Strategy, FSDP1Strategy])
@pytest.mark.parametrize("hours", [0.0, -1.0, float("nan"), float("inf")])
def test_what_is_no_time_is_refused(strategy: Any, hours: float) -> None:
    with pytest.raises(ValueError, match=r"timeout_hours must be above 0, and is a number of hours; got"):
        strategy(timeout_hours=hours)


def test_fsdp2_waits_as_long_as_it_is_told() -> None:
    """And so do the groups of its mesh, in which weights are gathered."""
    strategy = started(timeout_hours=2.5)
    assert waits() == timedelta(hours=2.5)
    assert waits(strategy.device_mesh["data_parallel"].get_group()) == timedelta(hours=2.5)


def test_the_first_fsdp_waits_as_long_as_it_is_told() -> None:
    strategy = FSDP1Strategy(timeout_hours=0.75)
    strategy.parallel_devices = [torch.device("cpu")]
    strategy.cluster_environment = LightningEnvironment()
    strategy._lightning_module = tiny_module()
    strategy.accelerator = tiny_trainer(1, []).accelerator
    FSDPStrategy.setup_environment(strategy)  # ours refuses a single process
    assert waits() == timedelta(minutes=45)


@pytest.mark.parametrize(
    ("options", "limit"),
    [
        ((), timedelta(hours=HOURS)),
        (("--trainer.strategy=DDPStrategy", "--trainer.strategy.timeout=12:00:00"), timedelta(hours=12)),
    ],
    ids=["by name", "as the fragment says"],
)
def test_ddp_waits_as_long(options: tuple[str, ...], limit: timedelta, tmp_path: Path) -> None:
    ddp = ("--config", str(CONFIGS / "strategy/ddp.yaml"), "--trainer.devices=1")
    assert not options or " ".join(options) in (CONFIGS / "strategy/ddp.yaml").read_text()
    succeed(tmp_path, "validate", *TINY, *ddp, *options, UNTRACKED)
    assert waits() == limit


def test_so_does_ddp_that_nobody_asked_for() -> None:
    let_ddp_wait()
    for name in ("auto", "ddp", "ddp_find_unused_parameters_true"):
        trainer = pl.Trainer(accelerator="cpu", devices=2, strategy=name, logger=False)
        assert trainer.strategy._timeout == timedelta(hours=HOURS)
