"""What our own training costs in tokens, and in the share of them that learns."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.compare import Side, costs, interleave, of_rounds, spread
from benchmarks.floors import needed_to_train
from benchmarks.models import SIZES, Size, write
from benchmarks.report import emit
from benchmarks.settings import Settings

SHARES = (1.0, 0.5, 0.2, 0.1, 0.05)
LENGTHS = (64, 128, 256, 512, 1024)
PROMPTS = (1, 2, 4, 8)


def by_length(size: Size, lengths: Iterable[int]) -> list[Size]:
    """One prompt with four responses, ever longer."""
    return [replace(size, prompts=1, responses=4, new_tokens=length) for length in lengths]


def by_rows(size: Size, prompts: Iterable[int]) -> list[Size]:
    """Responses of the usual length, ever more."""
    return [replace(size, prompts=number) for number in prompts]


def sides(settings: Settings, sizes: list[Size]) -> list[Side]:
    """One side per amount of work."""
    return [Side(str(number), "ours", replace(settings, size=size)) for number, size in enumerate(sizes)]


def tokens(size: Size) -> int:
    """Prompt and response tokens of a step."""
    return size.rows * (size.prompt_tokens + size.new_tokens)


def in_tokens(name: str, settings: Settings, sizes: list[Size], of: str, repeats: int) -> None:
    """Print what a token costs as there are more of them: the same where cost grows linearly."""
    run = sides(settings, sizes)
    interleave(run, repeats, visits=1)

    def each(side: Side) -> list[float]:
        return [1e3 * second / tokens(sizes[run.index(side)]) for second in costs(side, "train")]

    for side, size in zip(run, sizes, strict=True):
        emit(
            "scaling", of, settings.device, size=name, rho=settings.rho, rows=size.rows, new_tokens=size.new_tokens,
            tokens=tokens(size), repeats=repeats, **spread(costs(side, "train")),
            milliseconds_per_token=spread(each(side))["median"],
            against_the_least=of_rounds(side, run[0], each)["median"], extra=side.memory["extra"],
        )  # fmt: skip


def in_rho(name: str, settings: Settings, shares: Sequence[float], repeats: int) -> None:
    """Print what training on half a step's prompts costs as fewer tokens learn, against all of them.

    Beside it stands how many times as cheap it would be by the operations that it cannot do without.
    """
    settings = replace(settings, size=replace(settings.size, prompts=-(-settings.size.prompts // 2)))
    run = [Side(str(rho), "ours", replace(settings, rho=rho)) for rho in shares]
    interleave(run, repeats, visits=1)
    needed = [needed_to_train(settings.size, rho) for rho in shares]
    for side, rho, least in zip(run, shares, needed, strict=True):
        emit(
            "scaling", "rho", settings.device, size=name, vocabulary=settings.size.vocabulary, rho=rho,
            tokens=tokens(settings.size), repeats=repeats, **spread(costs(side, "train")),
            cheaper_than_all=of_rounds(run[0], side, lambda s: costs(s, "train"))["median"],
            by_operations=needed[0] / least, extra=side.memory["extra"],
        )  # fmt: skip


def main(
    name: str,
    device: str,
    repeats: int,
    of: list[str],
    batch: dict[str, Any],
    longest: int,
    prompts: Sequence[int] = PROMPTS,
    shares: Sequence[float] = SHARES,
) -> None:
    """Measure and print.

    Args:
        name: The model.
        device: ``cpu`` or ``cuda``.
        repeats: Rounds that count.
        of: ``length``, ``rows`` or ``rho``.
        batch: More options of our batch.
        longest: Longest responses of ``length``.
        prompts: Numbers of prompts of ``rows``.
        shares: Of tokens that learn, of ``rho``; all of them first.
    """
    size = SIZES[name]
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(str(write(size, Path(folder))), size, device, "train", batch=batch)
        if "length" in of:
            lengths = [length for length in LENGTHS if length <= longest] or [size.new_tokens, 2 * size.new_tokens]
            in_tokens(name, settings, by_length(size, lengths), "length", repeats)
        if "rows" in of:
            in_tokens(name, settings, by_rows(size, prompts), "rows", repeats)
        if "rho" in of:
            in_rho(name, settings, shares, repeats)
