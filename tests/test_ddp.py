"""Two gloo processes give the gradients, metrics and weights of one, under DDP, FSDP2 and the first FSDP."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ddp_run import CASES, STEPS, Recorded, cases, run
from runs import FLOAT32_NORMS

from lit_rlvr.sharding import FSDP2Strategy

HERE = Path(__file__).parent
TOGETHER = ("ddp", "fsdp", "fsdp_last", "fsdp_offload", "fsdp1")


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
        if name.endswith("_0"):
            assert everyone(two_processes, name[:-2]) == one.chosen, name
        for ours, theirs in zip(two.metrics, one.metrics, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-7), name


def everyone(folder: Path, name: str) -> list[list[tuple[int, ...]]]:
    """The tokens that both processes chose in each step."""
    ranks = [Recorded(*torch.load(folder / f"{name}_{rank}.pt")).chosen for rank in range(2)]
    return [sorted(first + second) for first, second in zip(*ranks, strict=True)]


ROUNDED = 20 * 2**-9
"""A bfloat16 number is off by 2^-9 of itself at most. A gradient is a product along some 2 x 10 roundings between the
embedding and the loss, there and back, so it is off by less than that much of its norm. The weights are not made to
drift: clipped at 0.5 and with a learning rate of 0.03, six steps move two runs apart by 6 x 0.03 x 0.5 x 2 x ROUNDED =
0.007, in a norm of 24, which is less than the rounding of the weights."""


@pytest.fixture(scope="module")
def alone() -> Iterator[dict[str, Recorded]]:
    """One process: in float64, and in bfloat16 as autocast and as a sharded policy compute."""
    runs = {"float64": run("bfloat16", "auto", 1, dtype="float64"), "ddp": run("bfloat16", "auto", 1)}
    try:
        yield {**runs, "fsdp": run("bfloat16", FSDP2Strategy(param_dtype="bfloat16"), 1)}
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.timeout(480)
@pytest.mark.parametrize("strategy", TOGETHER)
def test_two_processes_equal_one_in_bfloat16(strategy: str, two_processes: Path, alone: dict[str, Recorded]) -> None:
    """In losses, gradient norms, gradients and the very tokens that learn; and both are float64 up to their rounding.

    The rollouts are the same, weighted by float32 facts; only the network's products are rounded, and in another order
    where micro-batches are cut in another way. Two runs that are each off by so much differ by twice as much at most.
    """
    flat = lambda gradients: torch.cat([g.double().flatten() for _, g in sorted(gradients.items())])  # noqa: E731
    assert sum(step["train/grad_norm"] > 0.5 for step in alone["float64"].metrics) >= 4  # and is clipped
    for other, roundings in (("ddp" if strategy == "ddp" else "fsdp", 2), ("float64", 1)):
        one = alone[other]
        assert everyone(two_processes, f"{strategy}_bfloat16") == one.chosen
        for rank in range(2):
            two = Recorded(*torch.load(two_processes / f"{strategy}_bfloat16_{rank}.pt"))
            assert len(two.gradients) == len(one.gradients) == STEPS
            for ours, theirs in zip(map(flat, two.gradients), map(flat, one.gradients), strict=True):
                assert (ours - theirs).norm() <= roundings * ROUNDED * theirs.norm()
                assert other != "float64" or not theirs.any() or (ours - theirs).any()  # bfloat16 it is
            for step, wanted in zip(two.metrics, one.metrics, strict=True):
                assert step["train/clip_high"] == step["train/clip_low"] == 0  # a ratio is nowhere near where it jumps
                assert step["train/tokens"] == wanted["train/tokens"]
                assert step["train/grad_norm"] == pytest.approx(wanted["train/grad_norm"], rel=roundings * ROUNDED)
                # The mean of ratios times advantages: errors of 2^-9 of a log-probability, about 3 nats.
                assert step["train/loss"] == pytest.approx(wanted["train/loss"], abs=roundings * 3 * 2**-9)
                for name in filter(lambda name: name.startswith(("rollout/", "credit/")), wanted):
                    assert step[name] == pytest.approx(wanted[name], rel=1e-5, abs=1e-7), name


@pytest.mark.slow
@pytest.mark.timeout(480)
@pytest.mark.parametrize(
    ("case", "collectives"), [("ddp_plain", 0), ("fsdp_plain", 3), ("fsdp_offload_kl", 3), ("fsdp1_plain", 3)]
)
def test_generation_gathers_weights_once(case: str, collectives: int, two_processes: Path) -> None:
    """Two decoder layers and the root, however many tokens a rank decodes; ranks decode different numbers."""
    for rank in range(2):
        assert Recorded(*torch.load(two_processes / f"{case}_{rank}.pt")).collectives == collectives


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
