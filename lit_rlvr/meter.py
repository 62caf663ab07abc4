"""The numbers that are logged about an optimiser step, summed over its micro-batches."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_rlvr.reduce import Reduce

MEANS: tuple[str, ...] = ("ratio", "clip_low", "clip_high", "kl_old", "entropy")
"""Means over the tokens that learn."""

OWN_MEANS: tuple[tuple[str, str], ...] = (
    ("kl_ref", "ref_tokens"),
    ("penalty", "penalty_tokens"),
    ("value_clip", "values"),
    ("engine_ratio", "engine_tokens"),
)
"""Means over other tokens, with the sum that counts them; left out where there are none."""

SUMS: tuple[str, ...] = (
    "tokens",
    "loss",
    *MEANS,
    *(name for pair in OWN_MEANS for name in pair),
    "value_loss",
    "rows",
    "entered",
    "places",
    "padding",
)

RATIOS: tuple[str, ...] = ("ratio", "engine_ratio")
"""Those of which the largest and the smallest are logged too."""


class Meter:
    """Sums and extremes, where the numbers are: on a GPU nothing waits for them before they are read."""

    def __init__(self) -> None:
        self.plain = dict.fromkeys(SUMS, 0.0)
        self.sums: dict[str, Tensor] = {}
        self.ends: dict[str, Tensor] = {}

    def add(self, **values: Tensor | float) -> None:
        """Add to sums, by name."""
        for name, value in values.items():
            if isinstance(value, Tensor):
                self.sums[name] = wide(value) + self.sums.get(name, 0.0)
            else:
                self.plain[name] += value

    def extremes(self, **log_ratios: Tensor) -> None:
        """Remember the largest and the smallest of ratios, by name, from their logarithms [m]."""
        for name, log_ratio in log_ratios.items():
            if log_ratio.numel():
                ends = wide(torch.stack([log_ratio.amax(), -log_ratio.amin()]))
                self.ends[name] = torch.maximum(ends, self.ends[name]) if name in self.ends else ends

    def read(self, reduce: Reduce) -> dict[str, float]:
        """The step's numbers over all ranks, as ``train/...``; every rank calls it."""
        sums, ends = self._fetched()
        total = dict(zip(SUMS, reduce.sum(sums).tolist(), strict=True))
        largest = dict(zip(RATIOS, reduce.max(ends).exp(), strict=True))
        largest["ratio"] = largest["ratio"].clamp(min=1.0)  # that of tokens that do not learn
        metrics = {f"train/{name}": total[name] / max(total["tokens"], 1.0) for name in MEANS}
        metrics |= {"train/loss": total["loss"], "train/tokens": total["tokens"]}
        for name, tokens in OWN_MEANS:
            if total[tokens]:
                metrics[f"train/{name}"] = total[name] / total[tokens]
        for name in RATIOS:
            if f"train/{name}" in metrics:
                metrics[f"train/{name}_max"] = float(largest[name][0])
                metrics[f"train/{name}_min"] = float(1 / largest[name][1])
        metrics["train/skipped_rows"] = total["rows"] - total["entered"]
        metrics["train/padding"] = total["padding"] / max(total["places"], 1.0)
        if total["values"]:
            metrics["train/value_loss"] = total["value_loss"]
        return metrics

    def _fetched(self) -> tuple[Tensor, Tensor]:
        """Sums [SUMS], and the largest log-ratios and the largest of their negatives [RATIOS, 2]: in one copy."""
        held = [*self.sums.values(), *(end for ends in self.ends.values() for end in ends)]
        fetched = iter(torch.stack(held).tolist() if held else [])
        plain = self.plain | {name: self.plain[name] + next(fetched) for name in self.sums}
        ends = dict.fromkeys(RATIOS, [-torch.inf] * 2)
        ends |= {name: [next(fetched), next(fetched)] for name in self.ends}
        sums = torch.tensor([plain[name] for name in SUMS], dtype=torch.float64)
        return sums, torch.tensor([ends[name] for name in RATIOS], dtype=torch.float64)


def wide(values: Tensor) -> Tensor:
    """The values in float64; on the CPU where a device has none."""
    return (values.cpu() if values.device.type == "mps" else values).double()
