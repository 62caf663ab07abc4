"""Every benchmark, one by one: what ``make bench`` runs."""

from __future__ import annotations

from typing import Literal

from benchmarks import cluster, floors, head, memory, scaling, step
from benchmarks.ceilings import measured
from benchmarks.models import SIZES
from benchmarks.processes import launch
from benchmarks.settings import Settings
from benchmarks.step import Asked

ROUNDS: dict[str, dict[str, int]] = {
    "S": {"step": 5, "rollout": 5, "train": 5, "scaling": 3},
    "M": {"step": 2, "rollout": 1, "train": 1, "scaling": 1},
    "tiny": {"step": 1, "rollout": 1, "train": 1, "scaling": 1},
}
"""Rounds that count, so that both models together take a quarter of an hour on two cores."""
RAGGED = {"S": 8, "M": 768}
"""Tokens that end a response, for responses of some 64 tokens in the mean if there were no limit."""


def compared(size: str) -> None:
    """Everything about one of the two models."""
    ceilings, rounds = measured(SIZES[size], "cpu"), ROUNDS[size]
    floors.main(size, Settings("", SIZES[size]), ceilings)
    cluster.compare(size, step.main(Asked("step", size, repeats=rounds["step"]), ceilings), ceilings)
    works: tuple[Literal["rollout", "train"], ...] = ("rollout", "train")
    for work in works:
        ragged = Asked(work, size, repeats=rounds[work], sides=("lit-rlvr", "TRL"), ends=RAGGED[size])
        step.main(ragged, ceilings)
    memory.main(size, "cpu")


def quick() -> None:
    """Every benchmark once, on a tiny model, in copies of this process."""
    launch.fork_from_here()
    ceilings = measured(SIZES["tiny"], "cpu")
    floors.main("tiny", Settings("", SIZES["tiny"]), ceilings)
    sides = ("lit-rlvr", "TRL")
    cluster.compare("tiny", step.main(Asked("step", "tiny", repeats=1, sides=sides), ceilings), ceilings)
    step.main(Asked("rollout", "tiny", repeats=1, sides=sides, ends=16))
    step.main(Asked("train", "tiny", repeats=1, sides=sides), ceilings)
    head.main("tiny", "cpu", 1, 0.2)
    scaling.main("tiny", "cpu", 1, ["length", "rows", "rho"], {}, longest=8)
    memory.main("tiny", "cpu")


def main(sizes: list[str], quickly: bool) -> None:
    """Run them.

    Args:
        sizes: Of S and M.
        quickly: Only see whether they work.
    """
    if quickly:
        quick()
        return
    for size in sizes:
        compared(size)
    if "S" in sizes:
        scaling.main("S", "cpu", ROUNDS["S"]["scaling"], ["length", "rows", "rho"], {}, longest=1024)
        head.main("49k", "cpu", 2, 0.2)
    if "M" in sizes:
        scaling.main("M", "cpu", ROUNDS["M"]["scaling"], ["rho"], {}, longest=0)
        scaling.main("wide", "cpu", 1, ["rho"], {}, longest=0)
        head.main("152k", "cpu", 2, 0.2, ("full", "selected"))
