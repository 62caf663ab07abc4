"""Numbers that may change during training: constant, ramped over rollout phases, or by stage."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from lit_rlvr.credit import CreditContext


@dataclass(frozen=True)
class Ramp:
    """A number that goes from ``start`` to ``end`` over ``phases`` rollout phases, and stays there.

    In YAML: ``{kind: linear, start: 1.0, end: 0.2, phases: 100}``.

    Args:
        kind: ``linear``, or ``cosine``: half a period, flat at both ends.
        start: Value up to phase ``begin``.
        end: Value from phase ``begin + phases`` on.
        phases: Length of the way, in rollout phases.
        begin: Rollout phase, counted from 0, in which it sets out.

    Raises:
        ValueError: For an unknown kind, an end or start that is not finite, no phases, or a negative ``begin``.
    """

    kind: Literal["linear", "cosine"]
    start: float
    end: float
    phases: int
    begin: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "cosine"):
            raise ValueError(f"a schedule's kind must be linear or cosine, got {self.kind!r}")
        if not math.isfinite(self.start) or not math.isfinite(self.end):
            raise ValueError(f"a schedule goes between finite numbers, got {self.start} and {self.end}")
        if self.phases < 1 or self.begin < 0:
            raise ValueError(
                f"a schedule needs phases of at least 1 and begin of at least 0, got {self.phases} and {self.begin}"
            )

    def at(self, step: int) -> float:
        """The value in rollout phase ``step``."""
        way = min(max((step - self.begin) / self.phases, 0.0), 1.0)
        if self.kind == "cosine":
            way = (1 - math.cos(math.pi * way)) / 2
        return self.end if way == 1 else self.start + way * (self.end - self.start)


@dataclass(frozen=True)
class ByStage:
    """One number per stage of training. In YAML: ``{rising: 1.0, plateau: 0.2}``; needs a stage detector.

    Args:
        rising: Value in the rising stage.
        plateau: Value in the plateau.

    Raises:
        ValueError: When one of them is not finite.
    """

    rising: float
    plateau: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.rising) or not math.isfinite(self.plateau):
            raise ValueError(f"a schedule takes finite numbers, got {self.rising} and {self.plateau}")


Schedule = Ramp | ByStage
"""What may stand where an option is ``float | Schedule``; a pure function of rollout phase and stage, without state."""


def at(value: float | Schedule, ctx: CreditContext) -> float:
    """What ``value`` is in the context's rollout phase and stage.

    Raises:
        ValueError: When it goes by stage, and no detector names one.
    """
    if isinstance(value, Ramp):
        return value.at(ctx.step)
    if isinstance(value, ByStage):
        if ctx.stage is None:
            raise ValueError("a schedule by stage needs a stage detector in the list; add StageDetector")
        return value.rising if ctx.stage == "rising" else value.plateau
    return value


def ends(value: float | Schedule) -> tuple[float, ...]:
    """The values that ``value`` lies between in every phase, to check its range by.

    >>> ends(0.2), ends(Ramp("linear", start=1.0, end=0.2, phases=9)), ends(ByStage(rising=1.0, plateau=0.5))
    ((0.2,), (1.0, 0.2), (1.0, 0.5))
    """
    if isinstance(value, Ramp):
        return value.start, value.end
    return (value.rising, value.plateau) if isinstance(value, ByStage) else (value,)


def scheduled(value: float | Schedule) -> bool:
    """Whether ``value`` may change during training, so that it is worth a line in the log."""
    return isinstance(value, Ramp | ByStage)
