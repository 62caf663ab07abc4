"""Every benchmark, one by one: what ``make bench`` runs."""

from __future__ import annotations

from typing import Literal

from benchmarks import cluster, floors, head, memory, scaling, step
from benchmarks.ceilings import measured
from benchmarks.models import SIZES
from benchmarks.processes import launch
from benchmarks.settings import Settings
from benchmarks.step import Asked

SIZES_OF = {"cpu": ("S", "M"), "cuda": ("0.6B", "1.7B")}
"""Models of each kind of device, small ones first."""
ROUNDS = {
    "S": {"step": 5, "rollout": 5, "train": 5, "scaling": 3},
    "M": {"step": 4, "rollout": 2, "train": 2, "scaling": 2},
    "0.6B": {"step": 4, "rollout": 2, "train": 2, "scaling": 2},
    "1.7B": {"step": 4, "rollout": 2, "train": 2, "scaling": 2},
}
"""Rounds that count. Where spreads are wide, an even number: the order of sides is turned round every time."""


def compared(name: str, device: str) -> None:
    """Everything that is against TRL or against the machine, about one model."""
    size, rounds = SIZES[name], ROUNDS[name]
    ceilings = measured(size, device)
    floors.main(name, Settings("", size, device), ceilings)
    cluster.compare(name, step.main(Asked("step", name, device, rounds["step"]), ceilings), ceilings)
    works: tuple[Literal["rollout", "train"], ...] = ("rollout", "train")
    for work in works:
        ends = size.vocabulary // size.new_tokens  # lengths that would have the limit as their mean
        step.main(Asked(work, name, device, rounds[work], ("lit-rlvr", "TRL"), ends))
    memory.main(name, device)


def alone(name: str, device: str) -> None:
    """What is about our own code alone."""
    rounds = ROUNDS[name]["scaling"]
    of = ["rho"] if name == "M" else ["length", "rows", "rho"]
    scaling.main(name, device, rounds, of, {}, longest=1024)
    if name == "S":
        head.main("49k", device, 2, 0.2)
    elif name == "M":
        scaling.main("wide", device, rounds, ["rho"], {}, longest=0)
        head.main("152k", device, 2, 0.2, ("full", "selected"))
    elif name == "0.6B":
        for work in ("49k", "152k"):
            head.main(work, device, 5, 0.2)


def quick(device: str) -> None:
    """Every benchmark once, on a tiny model; on a CPU in copies of this process, which a GPU does not allow."""
    if device == "cpu":
        launch.fork_from_here()
    ceilings = measured(SIZES["tiny"], device)
    floors.main("tiny", Settings("", SIZES["tiny"], device), ceilings)
    sides = ("lit-rlvr", "TRL")
    cluster.compare("tiny", step.main(Asked("step", "tiny", device, 1, sides), ceilings), ceilings)
    step.main(Asked("rollout", "tiny", device, 1, sides, ends=16))
    step.main(Asked("train", "tiny", device, 1, sides), ceilings)
    head.main("tiny", device, 1, 0.2)
    of = ["length", "rows", "rho"]
    scaling.main("tiny", device, 1, of, {}, longest=8, prompts=(1, 2), shares=(1.0, 0.2))
    memory.main("tiny", device, most=1)


def chosen(sizes: list[str], device: str) -> list[str]:
    """The models that are asked for; none asked for: those of the device.

    Raises:
        ValueError: For a model of the other kind of device.
    """
    if other := [size for size in sizes if size not in SIZES_OF[device]]:
        raise ValueError(f"model {other[0]} is not measured on {device}; {' and '.join(SIZES_OF[device])} are")
    return sizes or [*SIZES_OF[device]]


def main(sizes: list[str], device: str, quickly: bool) -> None:
    """Run them.

    Args:
        sizes: Names of models.
        device: ``cpu`` or ``cuda``.
        quickly: Only see whether they work.
    """
    if quickly:
        quick(device)
        return
    for size in sizes:
        compared(size, device)
        alone(size, device)
