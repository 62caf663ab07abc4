"""Steps, rollouts and training against TRL's GRPOTrainer."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from benchmarks.ceilings import Ceilings, measured
from benchmarks.compare import Side, costs, interleave, rates, ratios, spread
from benchmarks.floors import COUNTED, Floor, floors
from benchmarks.models import SIZES, write
from benchmarks.report import emit
from benchmarks.settings import Settings

ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
    "MALLOC_TOP_PAD_": "67108864",
}
"""glibc keeps freed memory instead of returning it to the system and faulting it in again."""

TUNED: dict[str, dict[str, Any]] = {
    "S": {"per_device_train_batch_size": 32},
    "M": {"per_device_train_batch_size": 8},
}
"""TRL's fastest options on a CPU, of those that ``python -m benchmarks tune`` tries; other models take its defaults."""

BESTED = "TRL tuned"
SIDES = ("lit-rlvr", "lit-rlvr, all tokens", "TRL", BESTED, "TRL, checkpointing")
DEFAULT: dict[str, tuple[str, ...]] = {
    "step": SIDES[:4],
    "rollout": ("lit-rlvr", "TRL", BESTED),
    "train": SIDES[:4],
}
"""Sides of each benchmark, ours first; on a GPU, TRL is tuned where its options are given."""


@dataclass(frozen=True)
class Asked:
    """What a comparison is of.

    Args:
        work: ``step``, ``rollout`` or ``train``.
        size: Name of the model.
        device: ``cpu`` or ``cuda``.
        repeats: Rounds that count.
        sides: Ours first.
        ends: Tokens that end a response.
        select: Which tokens learn on our side.
        batch: More options of our batch.
        engine: More options of our engine.
        trl: Options of "TRL tuned"; none: on a CPU, those that were found for the model.
    """

    work: Literal["step", "rollout", "train"]
    size: str
    device: str = "cpu"
    repeats: int = 5
    sides: tuple[str, ...] = ()
    ends: int = 0
    select: Literal["random", "top"] = "random"
    batch: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    trl: dict[str, Any] = field(default_factory=dict)

    @property
    def tuned(self) -> dict[str, Any] | None:
        """Options of "TRL tuned"; None: there are none that would tell it from TRL's defaults."""
        return self.trl or (TUNED.get(self.size, {}) if self.device == "cpu" else None)

    @property
    def names(self) -> tuple[str, ...]:
        """The sides to compare."""
        return self.sides or tuple(n for n in DEFAULT[self.work] if n != BESTED or self.tuned is not None)

    def checked(self) -> Asked:
        """The same.

        Raises:
            ValueError: For "TRL tuned" without options where nobody has looked for the best, or options without it.
        """
        names = self.names
        if BESTED in names and self.tuned is None:
            raise ValueError(
                f'"{BESTED}" has no options of its own on a GPU; find them with python -m benchmarks tune, and give '
                "them with --trl"
            )
        if self.trl and BESTED not in names:
            raise ValueError(f'--trl is for "{BESTED}", which is not among --sides')
        return self

    @property
    def parts(self) -> tuple[str, ...]:
        """Parts of the work that are told apart."""
        return ("step", "rollout", "train") if self.work == "step" else (self.work,)


def sides(asked: Asked, folder: str) -> list[Side]:
    """The sides of the comparison."""
    more: dict[str, Any] = {"select": asked.select, "batch": asked.batch, "engine": asked.engine}
    settings = Settings(folder, SIZES[asked.size], asked.device, asked.work, asked.ends, **more)
    tuned = replace(settings, trl=asked.tuned or {})
    saving = replace(settings, trl={"gradient_checkpointing": True})
    every = {
        "lit-rlvr": Side("lit-rlvr", "ours", settings),
        "lit-rlvr, all tokens": Side("lit-rlvr, all tokens", "ours", replace(settings, rho=1.0)),
        "TRL": Side("TRL", "theirs", settings),
        BESTED: Side(BESTED, "theirs", tuned, ALLOCATOR if asked.device == "cpu" else {}),
        "TRL, checkpointing": Side("TRL, checkpointing", "theirs", saving),
    }
    return [every[name] for name in asked.names]


def run(asked: Asked) -> list[Side]:
    """Measure every side."""
    with tempfile.TemporaryDirectory() as folder:
        every = sides(asked, folder)
        write(SIZES[asked.size], Path(folder), asked.ends, asked.device)
        interleave(every, asked.repeats)
    return every


def main(asked: Asked, ceilings: Ceilings | None = None) -> list[Side]:
    """Compare and print."""
    every = run(asked)
    ours = every[0]
    common: dict[str, Any] = {
        "size": asked.size, "ends": asked.ends, "select": asked.select, "repeats": asked.repeats
    }  # fmt: skip
    given = {"batch": asked.batch, "engine": asked.engine, "trl": asked.trl}
    common |= {name: options for name, options in given.items() if options}
    for side in every:
        for part in asked.parts:
            values: dict[str, Any] = {"side": side.name, "part": part, **spread(costs(side, part))}
            if part == "rollout":
                values["tokens_per_second"] = spread(rates(side))["median"]
            emit(asked.work, "seconds", asked.device, **common, **values)
        emit(asked.work, "memory", asked.device, **common, side=side.name, **side.memory)
    for side in every[1:]:
        for part in asked.parts:
            values = {"side": side.name, "over": ours.name, "part": part, **ratios(side, ours, part)}
            emit(asked.work, "ratio", asked.device, **common, **values)
    if not asked.ends and asked.select == "random":  # a floor knows no other lengths and no other choice
        distances(asked, every, ceilings or measured(SIZES[asked.size], asked.device), common)
    return every


def distances(asked: Asked, every: list[Side], ceilings: Ceilings, common: dict[str, Any]) -> None:
    """How far each side is from what the machine's measured ceilings allow, part by part.

    For TRL it is the same floor: no implementation could be more times as fast.
    """
    for side in every:
        assert isinstance(side.settings, Settings)
        for counted in COUNTED:
            each = floors(side.settings, ceilings, counted)
            for part in asked.parts:
                if counted != COUNTED[0] and part == "rollout":
                    continue  # the same as before
                mine = [f for f in each if part in f.parts]
                values = over(spread(costs(side, part))["median"], mine, ceilings)
                emit(asked.work, "floor", asked.device, **common, side=side.name, part=part, counted=counted, **values)


def over(seconds: float, floors: list[Floor], ceilings: Ceilings) -> dict[str, float]:
    """What was measured as a multiple of the floor; on a known GPU also as a share of what its maker names."""
    operations, floor = sum(f.operations for f in floors), sum(f.seconds for f in floors)
    own = sum(f.reachable for f in floors)
    values = {"gigaflop": operations / 1e9, "seconds": seconds, "floor": floor, "times": seconds / floor}
    values |= {"at_own_shapes": own, "times_at_own_shapes": seconds / own}
    return values | ({"mfu": operations / seconds / ceilings.nominal} if ceilings.nominal else {})
