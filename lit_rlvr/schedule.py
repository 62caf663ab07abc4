"""Numbers that may change during training: constant, ramped over rollout phases, or by stage.

An option that may be scheduled is annotated ``Schedule | float``, in this order: the command line's errors are then
those of the schedule. It is read with :func:`at`, and its range is checked on :func:`ends`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from lit_rlvr.credit import CreditContext


@dataclass(frozen=True)
class Schedule:
    """A number that goes from ``start`` to ``end`` over rollout phases, or one number per stage of training.

    In YAML ``{kind: cosine, start: 1.0, end: 0.2, phases: 100}`` or ``{rising: 1.0, plateau: 0.2}``, wherever an
    option may be a schedule. It is a pure function of the rollout phase and the stage, without a state to save.

    Args:
        kind: ``linear``, or ``cosine``: half a period, flat at both ends.
        start: Value up to phase ``begin``.
        end: Value from phase ``begin + phases`` on.
        phases: Length of the way, in rollout phases.
        begin: Rollout phase, counted from 0, in which it sets out.
        rising: Value in the rising stage, instead of all the others.
        plateau: Value in the plateau. Both need a stage detector.

    Raises:
        ValueError: For a mixture or a part of the two forms, numbers that are not finite, less than one phase, or a
            negative ``begin``.
    """

    kind: Literal["linear", "cosine"] = "linear"
    start: float | None = None
    end: float | None = None
    phases: int | None = None
    begin: int = 0
    rising: float | None = None
    plateau: float | None = None

    def __post_init__(self) -> None:
        ramp, stages = (self.start, self.end, self.phases), (self.rising, self.plateau)
        whole, empty = (stages, ramp) if self.by_stage else (ramp, stages)
        idle = self.by_stage and (self.begin or self.kind != "linear")
        if None in whole or any(part is not None for part in empty) or idle:
            raise ValueError("a schedule needs start, end and phases (and kind, begin), or else rising and plateau")
        if self.kind not in ("linear", "cosine"):
            raise ValueError(f"a schedule's kind must be linear or cosine, got {self.kind!r}")
        if not all(math.isfinite(value) for value in self.ends):
            raise ValueError(f"a schedule needs finite numbers, got {self.ends[0]} and {self.ends[1]}")
        if (self.phases is not None and self.phases < 1) or self.begin < 0:
            raise ValueError(
                f"a schedule needs phases of at least 1 and begin of at least 0, got {self.phases} and {self.begin}"
            )

    @property
    def by_stage(self) -> bool:
        """Whether it needs a stage detector."""
        return self.rising is not None or self.plateau is not None

    @property
    def ends(self) -> tuple[float, float]:
        """The two values that all others lie between."""
        first, last = (self.rising, self.plateau) if self.by_stage else (self.start, self.end)
        assert first is not None
        assert last is not None
        return first, last

    def at(self, step: int, stage: str | None = None) -> float:
        """The value in rollout phase ``step`` and stage ``stage``.

        Raises:
            ValueError: When it goes by stage, and there is none.
        """
        first, last = self.ends
        if self.by_stage:
            if stage is None:
                raise ValueError("a schedule by stage needs a stage detector in the list; add StageDetector")
            return first if stage == "rising" else last
        assert self.phases is not None
        way = min(max((step - self.begin) / self.phases, 0.0), 1.0)
        if self.kind == "cosine":
            way = (1 - math.cos(math.pi * way)) / 2
        return last if way == 1 else first + way * (last - first)


def at(value: Schedule | float, ctx: CreditContext) -> float:
    """What an option is in the context's rollout phase and stage."""
    return value.at(ctx.step, ctx.stage) if isinstance(value, Schedule) else value


def ends(value: Schedule | float) -> tuple[float, ...]:
    """The values that an option lies between in every phase, to check its range by.

    >>> ends(0.2), ends(Schedule(start=1.0, end=0.2, phases=9)), ends(Schedule(rising=1.0, plateau=0.5))
    ((0.2,), (1.0, 0.2), (1.0, 0.5))
    """
    return value.ends if isinstance(value, Schedule) else (value,)
