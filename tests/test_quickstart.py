"""The quickstart's promise: it learns, on every seed; its control does not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


def fit(folder: Path, *options: str, timeout: int = 400) -> dict[str, Any]:
    """Run ``lit-rlvr fit`` on the quickstart and return its report."""
    command = [sys.executable, "-m", "lit_rlvr", "fit", "--config", str(ROOT / "configs/quickstart.yaml"), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report: dict[str, Any] = json.loads((folder / "runs/quickstart/report.json").read_text())
    return report["evaluations"]


@pytest.mark.slow
@pytest.mark.timeout(450)
def test_the_quickstart_learns(tmp_path: Path) -> None:
    """About .35 after the warm start, at least .9 after reinforcement learning."""
    rows = fit(tmp_path)
    assert rows["base"]["sampled/mean_at_1"] < 0.1
    assert 0.25 < rows["after warm start"]["sampled/mean_at_1"] < 0.5
    assert rows["after RLVR"]["sampled/mean_at_1"] >= 0.9
    assert (tmp_path / "runs/quickstart/policy/model.safetensors").exists()
    assert (tmp_path / "mlflow.db").exists()


@pytest.mark.slow
@pytest.mark.timeout(450)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_the_quickstart_learns_on_two_processes(strategy: str, tmp_path: Path) -> None:
    """With the strategy's fragment, in fewer steps."""
    fragment = ("--config", str(ROOT / f"configs/strategy/{strategy}.yaml"))
    rows = fit(tmp_path, *fragment, "--trainer.max_steps=40")
    assert rows["after RLVR"]["sampled/mean_at_1"] > rows["after warm start"]["sampled/mean_at_1"] + 0.3


@pytest.mark.long
@pytest.mark.timeout(450)
@pytest.mark.parametrize("seed", [1, 2])
def test_other_seeds_learn(seed: int, tmp_path: Path) -> None:
    rows = fit(tmp_path, f"--seed_everything={seed}")
    assert rows["after RLVR"]["sampled/mean_at_1"] >= 0.9


@pytest.mark.long
@pytest.mark.timeout(450)
def test_the_bottom_80_percent_end_below_their_start(tmp_path: Path) -> None:
    """The control of Wang et al. 2025, Fig. 7: training on the tokens of low entropy ruins the policy."""
    overrides = ("--trainer.callbacks=StageDetector", "--config", str(ROOT / "configs/callbacks/bottom80.yaml"))
    rows = fit(tmp_path, *overrides)
    assert rows["after RLVR"]["sampled/mean_at_1"] < rows["after warm start"]["sampled/mean_at_1"]


@pytest.mark.long
@pytest.mark.timeout(450)
@pytest.mark.parametrize("algorithm", ["grpo", "dapo", "dr_grpo", "rloo"])
def test_every_algorithm_learns(algorithm: str, tmp_path: Path) -> None:
    rows = fit(tmp_path, "--config", str(ROOT / f"configs/algorithm/{algorithm}.yaml"))
    assert rows["after RLVR"]["sampled/mean_at_1"] >= 0.9
