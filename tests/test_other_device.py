"""Nothing mixes the tensors of a GPU with the CPU's: runs on a device that stands in for one equal those on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from lit_rlvr.models import tiny_qwen3

HERE = Path(__file__).parent
LORA = ("lora",) if find_spec("peft") else ()


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "cases",
    [
        ("shared", "padded", "packed", "kl", "ppo"),
        ("steps", "gspo", "micro", "inexact", "negative", *LORA),
        ("evaluated", "qwen3", "gemma2", "gemma3", "plain"),
    ],
    ids="-".join,
)
def test_another_device_gives_what_the_cpu_gives(cases: tuple[str, ...]) -> None:
    """In float64: metrics of every step and weights at the end, or tokens and their facts."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    command = [sys.executable, str(HERE / "other_device_run.py"), *cases]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert [line.split(":")[0] for line in done.stdout.splitlines() if "{" in line] == list(cases)


def test_the_built_in_model_is_the_same_wherever_it_is_made() -> None:
    """A strategy makes models on its device and in its dtype; what is kept for all runs does not depend on that."""
    expected = tiny_qwen3().state_dict()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            found = tiny_qwen3().state_dict()
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
