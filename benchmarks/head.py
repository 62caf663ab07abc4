"""The language-model head: chunks, and the tokens that learn alone, against full logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from benchmarks.compare import Side, costs, interleave, of_rounds, spread
from benchmarks.report import emit
from benchmarks.settings import HeadSettings

Road = Literal["full", "chunked", "selected", "every"]
ROADS: dict[Road, str] = {
    "full": "full logits",
    "chunked": "chunked log-probabilities",
    "selected": "selected head",
    "every": "selected head, all tokens",
}
WORK = {"tiny": (128, 32, 64), "49k": (49_152, 512, 4096), "152k": (151_936, 1024, 1024)}
"""Vocabulary, width and tokens: the head of model M, and that of Qwen3-0.6B on fewer tokens, for time's sake."""


def main(
    name: str, device: str, repeats: int, rho: float, roads: Sequence[Road] = ("full", "chunked", "selected")
) -> None:
    """Compare and print.

    Args:
        name: Of the work.
        device: ``cpu`` or ``cuda``.
        repeats: Rounds that count.
        rho: Share of tokens that learn.
        roads: The reference first.
    """
    vocabulary, hidden, tokens = WORK[name]
    run = [
        Side(ROADS[road], "head_side", HeadSettings(road, vocabulary, hidden, tokens, rho, device)) for road in roads
    ]
    interleave(run, repeats)
    common = {"vocabulary": vocabulary, "hidden": hidden, "tokens": tokens, "rho": rho, "repeats": repeats}
    full = run[0]
    for side in run:
        emit(
            "head", "head", device, **common, side=side.name, **spread(costs(side, "step")), **side.memory,
            times_faster=of_rounds(full, side, lambda s: costs(s, "step"))["median"],
            less_memory=full.memory["extra"] / max(side.memory["extra"], 1e-9),
        )  # fmt: skip
