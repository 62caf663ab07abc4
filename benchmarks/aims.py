"""What was aimed at, beside what was measured: made from the results, so that it is as new as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.predictions import against_trl, last
from benchmarks.suite import SIZES_OF

Results = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Found:
    """What was measured.

    Args:
        value: The median.
        low: The smallest of the rounds, where there are several.
        high: The largest.
        possible: The most that could be reached on this machine, where that is known.
    """

    value: float
    low: float | None = None
    high: float | None = None
    possible: float | None = None


@dataclass(frozen=True)
class Aim:
    """One number.

    Args:
        what: In words.
        wanted: The number; None: it is only to be reported.
        find: Looks it up in the results; None where it was not measured.
        at_least: Whether more is better.
    """

    what: str
    wanted: float | None
    find: Callable[[Results], Found | None]
    at_least: bool = True

    def met(self, value: float) -> bool:
        """Whether a number is good enough."""
        assert self.wanted is not None
        return value >= self.wanted if self.at_least else value <= self.wanted

    def verdict(self, found: Found | None) -> str:
        """In words; where some rounds say one thing and some the other, the median decides."""
        if found is None:
            return "not measured"
        if self.wanted is None:
            return "reported"
        words = "met" if self.met(found.value) else "missed"
        ends = {self.met(end) for end in (found.low, found.high) if end is not None}
        return f"{words}, within the spread" if len(ends) > 1 else words


def ratio(work: str, part: str, size: str, side: str) -> Callable[[Results], Found | None]:
    """How many times as long as ours TRL takes; possible is what it takes over the least that is needed."""

    def find(results: Results) -> Found | None:
        line = last(results, against_trl(work, part, size, side))
        floor = last(results, {**against_trl(work, part, size, side), "kind": "floor", "counted": "least"})
        return line and Found(line["median"], line["low"], line["high"], floor and floor["times"])

    return find


def number(column: str, **where: Any) -> Callable[[Results], Found | None]:
    """A number of one line."""

    def find(results: Results) -> Found | None:
        line = last(results, where)
        return Found(line[column]) if line and column in line else None

    return find


def over_trl(column: str, size: str) -> Callable[[Results], Found | None]:
    """Memory of a whole step of ours over TRL's: ``peak``, or ``extra``, beyond what was loaded before."""

    def find(results: Results) -> Found | None:
        where = {"benchmark": "step", "kind": "memory", "size": size, "ends": 0}
        ours, theirs = (last(results, {**where, "side": side}) for side in ("lit-rlvr", "TRL"))
        return Found(ours[column] / theirs[column]) if ours and theirs else None

    return find


def worst_estimate(results: Results) -> Found | None:
    """The largest deviation of an estimate of memory on a model that is measured, in percent."""
    sizes = {size for each in SIZES_OF.values() for size in each}
    lines = (line for line in results if line.get("kind") == "estimate" and line["size"] in sizes)
    off = [100 * abs(line["ratio"] - 1) for line in lines]
    return Found(max(off)) if off else None


def aims() -> Iterator[Aim]:
    """All of them."""
    for size, default, tuned in (("S", 2.5, 2.0), ("M", 4.5, 3.8)):
        yield Aim(f"step on {size}, TRL / lit-rlvr", default, ratio("step", "step", size, "TRL"))
        yield Aim(f"step on {size}, TRL tuned / lit-rlvr", tuned, ratio("step", "step", size, "TRL tuned"))
    floor = {"kind": "floor", "benchmark": "step", "size": "M", "side": "lit-rlvr", "part": "step", "counted": "least"}
    yield Aim("step on M, lit-rlvr / the least", 1.6, number("times", **floor), at_least=False)
    heads = ((49_152, "49k", 6.0), (151_936, "152k", 3.0))
    for vocabulary, short, wanted in heads:
        head = {"benchmark": "head", "vocabulary": vocabulary, "side": "selected head", "device": "cpu"}
        yield Aim(f"head and loss at {short}, full logits / 20 % of tokens", wanted, number("times_faster", **head))
        if short == "49k":
            mebibytes = 0.3e9 / 2**20
            yield Aim("their extra memory at 49k (MiB)", mebibytes, number("extra", **head), at_least=False)
    for size, short in (("M", "49k"), ("wide", "152k")):
        cheaper = number("cheaper_than_all", kind="rho", size=size, rho=0.2)
        yield Aim(f"training at {short}, all tokens / 20 % of tokens", 1.0, cheaper)
    for size in ("S", "M"):
        yield Aim(f"peak memory of a step on {size}, lit-rlvr / TRL", 1.0, over_trl("peak", size), at_least=False)
        yield Aim(f"its part beyond what was loaded before, on {size}", None, over_trl("extra", size))
    yield Aim("explain's estimate of memory, worst deviation (%)", 25.0, worst_estimate, at_least=False)
    for size in SIZES_OF["cuda"]:
        for part in ("step", "rollout"):
            yield Aim(f"{part} on {size}, on a GPU, TRL / lit-rlvr", None, ratio("step", part, size, "TRL"))
        used = {**floor, "size": size, "part": "train", "counted": "all tokens"}
        yield Aim(f"training on {size}, on a GPU, share of its operations per second", None, number("mfu", **used))
