"""Every test session has a cache of its own, and one thread per process."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from command_line import TINY, TinyFit, succeed, untouched_process


@pytest.fixture(scope="session", autouse=True)
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Built models go to a folder of the session; MLflow's database to the folder that a test runs in."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIT_RLVR_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("OMP_NUM_THREADS", "1")
        for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID", "LIT_RLVR_DEBUG"):
            patch.delenv(name, raising=False)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """What a test's commands and loggers leave behind in the process ends with it."""
    with untouched_process():
        yield


@pytest.fixture(scope="module", autouse=True)
def _rendezvous() -> Iterator[None]:
    """Where a Trainer has its processes meet is not passed on to the programs that tests of other files start."""
    before = {name: os.environ.get(name) for name in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK", "LOCAL_RANK")}
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture(scope="module")
def group() -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def tiny_fit(tmp_path_factory: pytest.TempPathFactory) -> TinyFit:
    """One run of the command line that several tests look at: tracked, with a page and an evaluation per phase."""
    folder = tmp_path_factory.mktemp("tiny_fit")
    pages = ("--trainer.callbacks+=RolloutPages", "--trainer.callbacks.every=1")
    return TinyFit(folder, succeed(folder, "fit", *TINY, "--trainer.val_check_interval=2", *pages))


@pytest.fixture
def unread() -> Iterator[None]:
    """Decoding reads no numbers from tensors on the CPU that it would not read on a GPU."""
    from lit_rlvr.engines import sampler

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler, "READABLE", ())
        yield
