"""``lit-rlvr explain --cluster``'s arithmetic, with this machine's measured ceilings, against measured steps."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import torch

from benchmarks.ceilings import Ceilings, measured
from benchmarks.compare import Side, median
from benchmarks.models import SIZES, configuration
from benchmarks.report import emit
from benchmarks.settings import Settings
from benchmarks.step import Asked, run
from lit_rlvr.cluster import USED, Work, rollout, scoring, training
from lit_rlvr.machines import Device, Machines


def work_of(settings: Settings) -> Work:
    """The work of one step, which is a phase.

    Rollouts in bfloat16 are scored again before tokens are chosen.
    """
    size = settings.size
    scorings = int(settings.dtype == "bfloat16" and settings.rho < 1)
    return Work.of(
        configuration(size), size.body + size.head, size=4 if settings.device == "cpu" else 2, rows=size.rows,
        prompts=size.prompts, prompt=size.prompt_tokens, response=size.new_tokens, scorings=scorings, learnings=1,
        recomputed=False, micro_batches=1, chosen=settings.rho,
    )  # fmt: skip


def this_machine(ceilings: Ceilings, device: str) -> Machines:
    """One device with the ceilings that were measured."""
    if device == "cuda":
        memory = float(torch.cuda.get_device_properties(0).total_memory)
    else:
        memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return Machines(1, 1, "this", Device(ceilings.best, ceilings.bandwidth, memory, 1.0, 1.0))


def compare(name: str, sides: list[Side], ceilings: Ceilings) -> None:
    """Print what would be predicted of each side of ours, and how long it took."""
    for side in sides:
        if side.program != "ours":
            continue
        settings: Any = side.settings
        work, machines = work_of(settings), this_machine(ceilings, settings.device)
        learning = training(work, machines)
        learning = replace(learning, seconds=learning.seconds + scoring(work, machines).seconds)
        for part, stage in (("rollout", rollout(work, machines)), ("train", learning)):
            took = median(side, part)
            share = USED["memory" if stage.bound == "memory bandwidth" else "multiplications"]
            emit(
                "cluster", "predicted", settings.device, size=name, side=side.name, part=part, bound=stage.bound,
                predicted=stage.seconds, measured=took, ratio=took / stage.seconds, assumed_share=share,
                reached_share=share * stage.seconds / took,
            )  # fmt: skip


def main(asked: Asked) -> None:
    """Measure and print."""
    compare(asked.size, run(asked), measured(SIZES[asked.size], asked.device))
