"""A run that is asked to stop ends at a phase boundary with a checkpoint, and goes on from it bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import saved_weights
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.callbacks import Callback
from lit_rlvr_callbacks import EntropyTopK
from runs import EvenTask, Recorder, tiny_module, tiny_trainer
from test_resume import ROOT, command, comparable

from lit_rlvr import RLVRDataModule
from lit_rlvr.checkpoint import PhaseCheckpoint
from lit_rlvr.preemption import EXIT_CODE, MARKER, Preemption


class Raises(Callback):
    """Sends this process a signal when optimiser step ``at`` begins, twice, as a group of processes may be sent it."""

    def __init__(self, at: int, number: signal.Signals) -> None:
        self.at, self.number = at, number

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.at:
            signal.raise_signal(self.number)
            signal.raise_signal(self.number)


def fit(folder: Path, *callbacks: Callback, resume: Path | None = None, steps: int = 8) -> tuple[Any, Recorder]:
    """Train, with checkpoints every third phase."""
    module, recorder = tiny_module(dtype="float32"), Recorder()
    checkpoints = PhaseCheckpoint(every=3, folder=str(folder))
    trainer = tiny_trainer(steps, [EntropyTopK(0.3), *callbacks, checkpoints, recorder])
    trainer.fit(module, datamodule=RLVRDataModule(EvenTask()), ckpt_path=resume, weights_only=True)
    return module, recorder


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Recorder]:
    """A run that went through."""
    return fit(tmp_path_factory.mktemp("whole"), Preemption())


@pytest.mark.parametrize(("at", "number"), [(2, signal.SIGTERM), (3, signal.SIGUSR1)])
def test_a_signal_ends_the_run_after_its_phase(
    at: int,
    number: signal.Signals,
    never_stopped: tuple[Any, Recorder],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """In the first or the second step of the second phase of two: four steps are done, and no fifth is begun."""
    before = signal.getsignal(number)
    whole, record = never_stopped
    with pytest.raises(SystemExit) as ended:
        fit(tmp_path / "stopped", Preemption(), Raises(at, number))
    assert ended.value.code == EXIT_CODE
    assert signal.getsignal(number) == before
    last = tmp_path / "stopped" / "last.ckpt"
    assert last.resolve().name == "phase_000002.ckpt"
    wanted = f"stopped by {number.name} after 4 optimiser steps; the same command with --ckpt_path={last} goes on"
    assert [r.message for r in caplog.records if r.name == "lit_rlvr.preemption"][-1] == wanted
    assert last.with_name(MARKER).read_text() == f"{number.name}\n"
    resumed, second = fit(tmp_path / "stopped", Preemption(), resume=last)
    assert not last.with_name(MARKER).exists()
    for one, two in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, two)
    assert [comparable(m) for m in record.metrics[4:]] == [comparable(m) for m in second.metrics]


def test_a_signal_in_the_last_phase_lets_the_run_end(tmp_path: Path) -> None:
    _, record = fit(tmp_path, Preemption(), Raises(7, signal.SIGTERM))
    assert len(record.metrics) == 8


def test_validation_does_not_hold_it_up(tmp_path: Path) -> None:
    """Though it is due after the very step."""
    validated: list[int] = []

    class Watch(Callback):
        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            validated.append(trainer.global_step)

    module, checkpoints = tiny_module(), PhaseCheckpoint(folder=str(tmp_path))
    trainer = tiny_trainer(8, [Preemption(), Raises(2, signal.SIGTERM), checkpoints, Watch()], val_check_interval=2)
    trainer.limit_val_batches = 1
    with pytest.raises(SystemExit):
        trainer.fit(module, datamodule=RLVRDataModule(EvenTask(), eval_prompts=2))
    assert validated == [2]


def test_what_it_needs_and_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Something that saves; under SLURM, requeueing. Without signals it does nothing."""
    with pytest.raises(ValueError, match="no signal 'SIGTREM'"):
        Preemption(["SIGTREM"])
    with pytest.raises(ValueError, match="saves by PhaseCheckpoint"):
        tiny_trainer(2, [Preemption()]).fit(tiny_module(), datamodule=RLVRDataModule(EvenTask()))
    slurm = {
        "SLURM_NTASKS": "1",
        "SLURM_JOB_NAME": "train",
        "SLURM_JOB_ID": "1",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
    }
    for name, value in {**slurm, "SLURM_NODEID": "0", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    for callback, requeues in ((Preemption(), False), (Preemption([]), True)):
        environment = SLURMEnvironment()
        trainer = tiny_trainer(2, [callback, PhaseCheckpoint(folder=str(tmp_path))], plugins=[environment])
        trainer.fit(tiny_module(), datamodule=RLVRDataModule(EvenTask()))
        assert environment.auto_requeue == requeues


def test_a_thread_can_train(tmp_path: Path) -> None:
    """There, Python lets nobody handle signals."""
    ended: list[int] = []
    thread = threading.Thread(target=lambda: ended.append(len(fit(tmp_path, Preemption(), steps=2)[1].metrics)))
    thread.start()
    thread.join(200)
    assert ended == [2]


def children(pid: int) -> list[int]:
    """Processes that ``pid`` has started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.timeout(400)
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the second process in /proc")
@pytest.mark.parametrize(
    "to", [pytest.param("all", marks=pytest.mark.long), pytest.param("second", marks=pytest.mark.slow)]
)
def test_two_processes_stop_together(to: str, tmp_path: Path) -> None:
    """Whether all are sent it, as SLURM does, or one of them: the run ends with 75 and goes on bit for bit."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ddp = ("--config", str(ROOT / "configs/strategy/ddp.yaml"), "--trainer.logger=false")
    stopped, log = tmp_path / "stopped", tmp_path / "log"
    with log.open("w") as err:
        process = subprocess.Popen(
            command(stopped, 2000, *ddp), env=environment, cwd=tmp_path, stderr=err, start_new_session=True
        )
    deadline = time.time() + 200
    while not (stopped / "checkpoints/phase_000002.ckpt").exists():
        assert process.poll() is None, log.read_text()[-2000:]
        assert time.time() < deadline
        time.sleep(0.02)
    if to == "all":
        os.killpg(process.pid, signal.SIGTERM)
    else:
        ranks = [c for c in children(process.pid) if b"lit_rlvr" in Path(f"/proc/{c}/cmdline").read_bytes()]
        os.kill(ranks[0], signal.SIGUSR1)
    assert process.wait(120) == EXIT_CODE, log.read_text()[-2000:]
    last = stopped / "checkpoints/last.ckpt"
    phases = int(last.resolve().stem.removeprefix("phase_"))
    name = "SIGTERM" if to == "all" else "SIGUSR1"
    text = " ".join(log.read_text().split())
    assert f"stopped by {name} after {2 * phases} optimiser steps; the same command with --ckpt_path={last}" in text
    for folder, more in ((stopped, (f"--ckpt_path={last}",)), (tmp_path / "whole", ())):
        subprocess.run(
            [*command(folder, 2 * phases + 4, *ddp), *more], env=environment, cwd=tmp_path, timeout=200, check=True,
            capture_output=True,
        )  # fmt: skip
    ours, theirs = (saved_weights(folder / "policy") for folder in (stopped, tmp_path / "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert json.loads((stopped / "report.json").read_text())["steps"] == 2 * phases + 4
