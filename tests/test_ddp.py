"""Two gloo processes give the gradients, metrics and weights of one, under DDP, FSDP2 and the first FSDP."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ddp_run import CASES, STEPS, Recorded, cases, run
from runs import FLOAT32_NORMS

HERE = Path(__file__).parent
TOGETHER = ("ddp", "fsdp", "fsdp_last", "fsdp1")


def torchrun(script: str, *arguments: str, processes: int = 2, timeout: int = 300) -> None:
    """Run a script of this folder on several processes."""
    path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}")
    command = [sys.executable, *launcher, str(HERE / script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stderr[-6000:]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case under every strategy, in one launch: where each rank saved what it recorded."""
    folder = tmp_path_factory.mktemp("two")
    torchrun("ddp_run.py", str(folder), *TOGETHER, timeout=380)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(480)
@pytest.mark.parametrize("case", [case for case in CASES if case != "bfloat16"])
def test_two_processes_equal_one(case: str, two_processes: Path) -> None:
    """Rollouts, thresholds, denominators and clipping do not know how many processes there are."""
    one = run(case, "auto", 1)
    # A mini-batch of one prompt may keep no token at all; its step is skipped, on every process.
    assert len(one.gradients) + one.metrics[-1]["train/skipped_steps"] == STEPS
    assert len(one.gradients) >= 3
    for name in [f"{s}_{case}_{rank}" for s in TOGETHER if case in cases(s) for rank in range(2)]:
        two = Recorded(*torch.load(two_processes / f"{name}.pt"))
        # float64, but for the model's norms and the facts: rows that share a prompt are cut in another way.
        torch.testing.assert_close(two.gradients, one.gradients, **FLOAT32_NORMS, msg=lambda m: f"{name}: {m}")  # noqa: B023
        torch.testing.assert_close(two.weights, one.weights, rtol=1e-5, atol=1e-7)
        for ours, theirs in zip(two.metrics, one.metrics, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-7), name


@pytest.mark.slow
@pytest.mark.timeout(480)
@pytest.mark.parametrize("strategy", TOGETHER)
def test_bfloat16_is_float64_up_to_its_rounding(strategy: str, two_processes: Path) -> None:
    """The same rollouts, weighted by float32 facts; only the network's products are rounded.

    A bfloat16 number is off by 2^-9 of itself at most. A gradient is a product along some 2 x 10 roundings between the
    embedding and the loss, there and back, so it is off by less than 20 x 2^-9 of its norm.
    """
    one = run("bfloat16", "auto", 1, dtype="float64")
    flat = lambda gradients: torch.cat([g.double().flatten() for _, g in sorted(gradients.items())])  # noqa: E731
    for rank in range(2):
        two = Recorded(*torch.load(two_processes / f"{strategy}_bfloat16_{rank}.pt"))
        exact, rounded = flat(one.gradients[0]), flat(two.gradients[0])
        assert 0 < (rounded - exact).norm() < 20 * 2**-9 * exact.norm()
        for ours, theirs in zip(two.metrics, one.metrics, strict=True):
            assert ours["train/tokens"] == theirs["train/tokens"]
            assert ours["train/grad_norm"] == pytest.approx(theirs["train/grad_norm"], rel=20 * 2**-9)
            # The mean of log-probabilities times advantages: errors of 2^-9 of a log-probability, about 3 nats.
            assert ours["train/loss"] == pytest.approx(theirs["train/loss"], abs=3 * 2**-9)


@pytest.mark.slow
@pytest.mark.timeout(480)
@pytest.mark.parametrize(("strategy", "collectives"), [("ddp", 0), ("fsdp", 3), ("fsdp1", 3)])
def test_generation_gathers_weights_once(strategy: str, collectives: int, two_processes: Path) -> None:
    """Two decoder layers and the root, however many tokens a rank decodes; ranks decode different numbers."""
    for rank in range(2):
        assert Recorded(*torch.load(two_processes / f"{strategy}_plain_{rank}.pt")).collectives == collectives


@pytest.mark.slow
@pytest.mark.timeout(480)
def test_gradients_are_reduced_as_often_as_asked(two_processes: Path) -> None:
    """Under FSDP2 the two layers and the root, once per micro-batch or per step; DDP once per step, by itself."""
    for rank in range(2):
        counts = {
            strategy: Recorded(*torch.load(two_processes / f"{strategy}_kl_{rank}.pt")).reductions[1::2]
            for strategy in ("ddp", "fsdp", "fsdp_last")
        }
        assert (counts["ddp"], counts["fsdp_last"]) == ((1,) * 3, (3,) * 3)
        assert all(count % 3 == 0 and count >= 6 for count in counts["fsdp"])
