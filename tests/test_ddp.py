"""Two gloo processes give the gradients and metrics of one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent


def run(devices: int, folder: Path, case: str) -> list[Any]:
    """Run ddp_run.py and return what each rank saved."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    command = [sys.executable, str(HERE / "ddp_run.py"), str(devices), str(folder), case]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{devices}_{rank}.pt") for rank in range(devices)]


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("case", ["plain", "kl", "dynamic", "ragged"])
def test_two_processes_equal_one(case: str, tmp_path: Path) -> None:
    """Rollouts, thresholds, denominators and clipping do not know how many processes there are."""
    ((gradients, metrics),) = run(1, tmp_path, case)
    for other_gradients, other_metrics in run(2, tmp_path, case):
        # A mini-batch of one prompt may keep no token at all; its step is skipped, on every process.
        assert len(gradients) + metrics[-1]["train/skipped_steps"] == 6
        assert len(gradients) >= 3
        for one, two in zip(gradients, other_gradients, strict=True):
            for name, gradient in one.items():
                # float64 throughout, but sums over rows are taken in another order and facts are kept in float32.
                torch.testing.assert_close(two[name], gradient, rtol=1e-5, atol=1e-9)
        for one, two in zip(metrics, other_metrics, strict=True):
            assert one == pytest.approx(two, rel=1e-5, abs=1e-7)
