"""What was expected before anything was measured, to stand beside what was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Prediction:
    """One number.

    Args:
        what: In words.
        value: What was expected.
        why: What it follows from.
        column: Where results have it.
        where: Which result it is.
    """

    what: str
    value: float
    why: str
    column: str
    where: dict[str, Any] = field(default_factory=dict)

    def measured(self, results: Sequence[dict[str, Any]]) -> Any:
        """The number that was measured; None where it was not."""
        line = last(results, self.where)
        return None if line is None else line.get(self.column)


def last(results: Sequence[dict[str, Any]], where: dict[str, Any]) -> dict[str, Any] | None:
    """The last of the results that have these values; None: there is none."""
    found = (r for r in reversed(results) if all(r.get(name) == value for name, value in where.items()))
    return next(found, None)


def against_trl(work: str, part: str, size: str, side: str) -> dict[str, Any]:
    """The line of a ratio with responses of one length."""
    return {"benchmark": work, "kind": "ratio", "part": part, "size": size, "side": side, "ends": 0}


FLOOR = "products at 60 to 90 GFLOP/s, prompts shared, and 15 % (S: 30 %) for the rest; TRL's share of the time"
COUNT = "operations"
ELSEWHERE = "measured on another machine"

PREDICTIONS = (
    Prediction("step on S, TRL / ours", 1.8, FLOOR, "median", against_trl("step", "step", "S", "TRL")),
    Prediction("step on M, TRL / ours", 2.6, FLOOR, "median", against_trl("step", "step", "M", "TRL")),
    Prediction("step on M, TRL tuned / ours", 2.2, FLOOR, "median", against_trl("step", "step", "M", "TRL tuned")),
    Prediction("rollout on S, TRL / ours", 2.0, FLOOR, "median", against_trl("step", "rollout", "S", "TRL")),
    Prediction("rollout on M, TRL / ours", 1.8, FLOOR, "median", against_trl("step", "rollout", "M", "TRL")),
    Prediction("training on S, TRL / ours", 1.7, FLOOR, "median", against_trl("step", "train", "S", "TRL")),
    Prediction("training on M, TRL / ours", 3.2, FLOOR, "median", against_trl("step", "train", "M", "TRL")),
    Prediction(
        "head at 49k, full logits / selected", 6.4, ELSEWHERE, "times_faster",
        {"benchmark": "head", "vocabulary": 49_152, "side": "selected head", "device": "cpu"},
    ),
    Prediction(
        "head at 152k, full logits / selected", 3.4, ELSEWHERE, "times_faster",
        {"benchmark": "head", "vocabulary": 151_936, "side": "selected head", "device": "cpu"},
    ),
    Prediction(
        "extra memory of the selected head at 49k (MiB)", 219, ELSEWHERE, "extra",
        {"benchmark": "head", "vocabulary": 49_152, "side": "selected head", "device": "cpu"},
    ),
    Prediction(
        "training on all tokens / on 20 %, V 49k", 1.54, COUNT, "cheaper_than_all",
        {"kind": "rho", "size": "M", "rho": 0.2},
    ),
    Prediction(
        "training on all tokens / on 20 %, V 152k", 3.3, COUNT, "cheaper_than_all",
        {"kind": "rho", "size": "wide", "rho": 0.2},
    ),
    Prediction(
        "a token of 1024-token responses / of 64-token ones, S", 1.4, "attention's operations", "against_the_least",
        {"kind": "length", "size": "S", "new_tokens": 1024},
    ),
    Prediction(
        "a token in 64 rows / in 8, S", 1.0, "linear", "against_the_least", {"kind": "rows", "size": "S", "rows": 64}
    ),
    Prediction(
        "memory of training on M, estimated / measured", 1.0, "the estimate", "ratio",
        {"kind": "estimate", "size": "M", "work": "train", "rho": 0.2, "gradient_checkpointing": False},
    ),
    Prediction(
        "training on M, measured / estimated for this machine", 0.6, "40 % of the ceiling assumed, 65 % likely",
        "ratio", {"kind": "predicted", "size": "M", "side": "lit-rlvr", "part": "train"},
    ),
)  # fmt: skip
"""Made from counted operations, and from what TRL and single products took on this machine before the comparison."""
