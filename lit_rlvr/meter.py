"""The numbers that are logged about an optimiser step, summed over its micro-batches."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_rlvr.reduce import Reduce

MEANS: tuple[str, ...] = ("ratio", "clip_low", "clip_high", "kl_old", "entropy")
"""Means over the tokens that learn."""

SUMS: tuple[str, ...] = (
    "tokens",
    "loss",
    *MEANS,
    "kl_ref",
    "ref_tokens",
    "penalty",
    "penalty_tokens",
    "value_loss",
    "value_clip",
    "values",
    "rows",
    "entered",
    "places",
    "padding",
)


class Meter:
    """Sums and extremes, on the CPU."""

    def __init__(self) -> None:
        self.sums = torch.zeros(len(SUMS), dtype=torch.float64)
        self.log_ratio_max, self.log_ratio_min = (torch.zeros((), dtype=torch.float64) for _ in range(2))

    def add(self, **values: Tensor | float) -> None:
        """Add to sums, by name."""
        for name, value in values.items():
            self.sums[SUMS.index(name)] += float(value)

    def extremes(self, log_ratio: Tensor) -> None:
        """Remember the largest and the smallest ratio."""
        if log_ratio.numel():
            self.log_ratio_max = torch.maximum(self.log_ratio_max, log_ratio.max().double().cpu())
            self.log_ratio_min = torch.minimum(self.log_ratio_min, log_ratio.min().double().cpu())

    def read(self, reduce: Reduce) -> dict[str, float]:
        """The step's numbers over all ranks, as ``train/...``."""
        total = dict(zip(SUMS, reduce.sum(self.sums).tolist(), strict=True))
        metrics = {f"train/{name}": total[name] / max(total["tokens"], 1.0) for name in MEANS}
        metrics |= {"train/loss": total["loss"], "train/tokens": total["tokens"]}
        extremes = reduce.max(torch.stack([self.log_ratio_max, -self.log_ratio_min])).exp()
        metrics |= {"train/ratio_max": float(extremes[0]), "train/ratio_min": float(1 / extremes[1])}
        for name, tokens in (("kl_ref", "ref_tokens"), ("penalty", "penalty_tokens"), ("value_clip", "values")):
            if total[tokens]:
                metrics[f"train/{name}"] = total[name] / total[tokens]
        metrics["train/skipped_rows"] = total["rows"] - total["entered"]
        metrics["train/padding"] = total["padding"] / max(total["places"], 1.0)
        if total["values"]:
            metrics["train/value_loss"] = total["value_loss"]
        return metrics
