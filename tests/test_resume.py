"""A run that is stopped at a phase boundary and resumed ends like one that was not."""

from __future__ import annotations

import logging
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lit_rlvr_callbacks import EntropyTopK, StageDetector
from runs import EvenTask, Recorder, tiny_module, tiny_trainer

from lit_rlvr import RLVRDataModule
from lit_rlvr.checkpoint import PhaseCheckpoint, configured_again, hyperparameters
from lit_rlvr.critic import Critic
from lit_rlvr.gae import GAE
from lit_rlvr.shaping import DynamicSampling


def options(**more: Any) -> dict[str, Any]:
    """Everything that has state: scheduler, dynamic sampling, momentum."""
    scheduler = lambda o: torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=6)  # noqa: E731
    return {"dtype": "float32", "scheduler": scheduler, "dynamic_sampling": DynamicSampling(3), **more}


def fit(folder: Path, steps: int, ckpt_path: Path | None = None, **more: Any) -> tuple[Any, Recorder, Any]:
    """Train up to ``steps`` with a checkpoint after every phase."""
    module, recorder, stage = tiny_module(**options(**more)), Recorder(), StageDetector(window=1, patience=2)
    callbacks: list[Callback] = [stage, EntropyTopK(0.3, select="random"), recorder]
    callbacks.append(PhaseCheckpoint(every=1, keep=10, folder=str(folder)))
    trainer = tiny_trainer(steps, callbacks)
    trainer.fit(module, datamodule=RLVRDataModule(EvenTask()), ckpt_path=ckpt_path, weights_only=True)
    return module, recorder, stage


def comparable(metrics: dict[str, float]) -> dict[str, float]:
    """Metrics without the clock."""
    return {n: v for n, v in metrics.items() if not n.startswith(("time/", "rollout/tokens_per_s"))}


PPO: dict[str, Any] = {"advantage": GAE(), "critic": Critic(lr=1e-2), "dynamic_sampling": None}


@pytest.mark.parametrize(("stop", "more"), [(2, {}), (6, {}), (4, PPO)], ids=["early", "late", "with a critic"])
def test_resume_is_bit_identical(stop: int, more: dict[str, Any], tmp_path: Path) -> None:
    whole, record, stage = fit(tmp_path / "a", 10, **more)
    fit(tmp_path / "b", stop, **more)
    resumed, second, stage_again = fit(tmp_path / "b", 10, tmp_path / "b" / "last.ckpt", **more)
    for one, two in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, two)
    assert [comparable(m) for m in record.metrics[stop:]] == [comparable(m) for m in second.metrics]
    assert stage.state_dict() == stage_again.state_dict()
    assert stage.plateau_step is not None


def test_resume_inside_a_phase_is_refused(tmp_path: Path) -> None:
    module = tiny_module(**options())
    trainer = tiny_trainer(3, [])
    trainer.fit(module, datamodule=RLVRDataModule(EvenTask()))
    trainer.save_checkpoint(tmp_path / "mid.ckpt")
    with pytest.raises(RuntimeError, match=r"inside rollout phase 1.*multiple of 2"):
        fit(tmp_path, 8, tmp_path / "mid.ckpt")


def test_old_checkpoints_are_deleted_and_the_last_is_linked(tmp_path: Path) -> None:
    module = tiny_module()
    trainer = tiny_trainer(10, [PhaseCheckpoint(every=2, keep=1, folder=str(tmp_path))])
    trainer.fit(module, datamodule=RLVRDataModule(EvenTask()))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.ckpt", "phase_000005.ckpt"]
    assert (tmp_path / "last.ckpt").resolve().name == "phase_000005.ckpt"


def test_phases_that_take_long_are_saved_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the clock says 50 minutes per phase of two steps; null asks no clock."""

    class Slow(Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            clock[0] += 25 * 60

    for minutes, names in ((49, [1, 2]), (51, [2]), (None, [])):
        clock, folder = [0.0], tmp_path / str(minutes)
        monkeypatch.setattr("lit_rlvr.checkpoint.time.monotonic", lambda clock=clock: clock[0])
        checkpoints = PhaseCheckpoint(minutes=minutes, keep=9, folder=str(folder), at_end=False)
        tiny_trainer(4, [Slow(), checkpoints]).fit(tiny_module(), datamodule=RLVRDataModule(EvenTask()))
        assert sorted(folder.glob("phase_*")) == [folder / f"phase_{n:06d}.ckpt" for n in names]
    with pytest.raises(ValueError, match=r"PhaseCheckpoint\.minutes must be above 0"):
        PhaseCheckpoint(minutes=0)


def test_the_configuration_beats_the_checkpoint(caplog: pytest.LogCaptureFixture) -> None:
    """A changed learning rate scales the scheduled one; other settings are replaced; changes are printed."""
    weight = torch.nn.Parameter(torch.ones(1))
    saved = torch.optim.AdamW([weight], lr=1.0, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LinearLR(saved, 0.5, total_iters=4)
    state = saved.state_dict(), schedule.state_dict()
    resumed = torch.optim.AdamW([weight], lr=2.0, weight_decay=0.2)
    again = torch.optim.lr_scheduler.LinearLR(resumed, 0.5, total_iters=4)
    fresh = hyperparameters(resumed)
    resumed.load_state_dict(state[0])
    again.load_state_dict(state[1])
    with caplog.at_level(logging.INFO, logger="lit_rlvr.checkpoint"):
        configured_again(resumed, [again], fresh)
    group = resumed.param_groups[0]
    assert (group["lr"], group["initial_lr"], group["weight_decay"]) == (1.0, 2.0, 0.2)
    assert again.base_lrs == [2.0]
    assert "lr 1.0 in the checkpoint, 2.0 in the configuration" in caplog.text
    assert "weight_decay 0.1 in the checkpoint, 0.2 in the configuration" in caplog.text


def test_equal_settings_change_nothing(caplog: pytest.LogCaptureFixture) -> None:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], lr=0.3)
    before = optimizer.state_dict()
    with caplog.at_level(logging.INFO, logger="lit_rlvr.checkpoint"):
        configured_again(optimizer, [], hyperparameters(optimizer))
    assert optimizer.state_dict() == before
    assert not caplog.text


ROOT = Path(__file__).parent.parent


def command(folder: Path, steps: int, *more: str) -> list[str]:
    """A short run of the command line with random weights."""
    return [
        *(sys.executable, "-m", "lit_rlvr", "fit", "--config", str(ROOT / "configs/quickstart.yaml"), "--warmup=null"),
        *(f"--trainer.max_steps={steps}", "--model.batch.prompts=8", "--model.batch.minibatch_prompts=4"),
        *("--data.eval_prompts=4", "--trainer.val_check_interval=1000", f"--trainer.default_root_dir={folder}"),
        *(
            "--model.dynamic_sampling=null",
            "--trainer.callbacks+=PhaseCheckpoint",
            "--trainer.callbacks.every=1",
            *more,
        ),
    ]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("devices", [1, 2])
def test_killed_and_resumed_from_the_command_line(devices: int, tmp_path: Path) -> None:
    """Killed at a random moment, resumed from its last checkpoint: the same policy, in the same MLflow run."""
    from mlflow.tracking import MlflowClient

    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/m.db"}
    ddp = ["--config", str(ROOT / "configs/strategy/ddp.yaml")] if devices == 2 else []
    whole = subprocess.run(
        [*command(tmp_path / "whole", 24, *ddp), "--trainer.logger=false"], env=environment, cwd=tmp_path, timeout=200,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert whole.returncode == 0, whole.stderr[-2000:]
    killed = tmp_path / "killed"
    process = subprocess.Popen(
        command(killed, 2000, *ddp), env=environment, cwd=tmp_path, stderr=subprocess.DEVNULL, start_new_session=True
    )
    wanted = random.Random(devices).randint(2, 8)
    deadline = time.time() + 120
    while not (killed / f"checkpoints/phase_{wanted:06d}.ckpt").exists():
        assert process.poll() is None
        assert time.time() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(30)
    # The file named last may be half written; the link is set only after it is whole.
    resumed = subprocess.run(
        [*command(killed, 24, *ddp), f"--ckpt_path={killed}/checkpoints/last.ckpt"], env=environment, cwd=tmp_path,
        timeout=200, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    assert "resume: trainer.max_steps is 24; it was 2000 in the checkpoint" in resumed.stderr
    names = ("policy/model.safetensors",)
    for name in names:
        assert (killed / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    client = MlflowClient(f"sqlite:///{tmp_path}/m.db")
    (experiment,) = client.search_experiments(filter_string="name = 'lit-rlvr'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    steps = {m.step for m in client.get_metric_history(run.info.run_id, "train/loss")}
    assert set(range(1, 25)) <= steps
