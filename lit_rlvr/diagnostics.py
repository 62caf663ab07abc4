"""A phase's diagnostics in a few lines for the terminal: what callbacks did, and how far the policy moved."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

LEARNING = (
    "clip_low", "clip_high", "ratio_min", "ratio_max", "kl_old", "kl_ref", "entropy", "grad_norm", "value_loss",
    "critic_grad_norm",
)  # fmt: skip
"""Of the last optimiser step, in this order."""

SAMPLES = ("entropy_positive", "entropy_negative")


def diagnostics(metrics: Mapping[str, float]) -> list[str]:
    """One line per credit callback, one about samples of either sign, and one about learning.

    >>> diagnostics({"credit/EntropyTopK/threshold": 0.125, "train/clip_low": 0.0, "train/kl_old": 1e-4})
    ['EntropyTopK  threshold 0.125', 'learning  clip_low 0, kl_old 0.0001']
    """
    of_callback: defaultdict[str, dict[str, float]] = defaultdict(dict)
    for key, value in metrics.items():
        head, _, rest = key.partition("/")
        callback, _, name = rest.rpartition("/")
        if head == "credit" and callback:
            of_callback[callback][name] = value
    groups = dict(of_callback)
    groups["samples"] = {n: metrics[f"credit/{n}"] for n in SAMPLES if f"credit/{n}" in metrics}
    groups["learning"] = {n: metrics[f"train/{n}"] for n in LEARNING if f"train/{n}" in metrics}
    return [
        f"{title}  {', '.join(f'{name} {value:.4g}' for name, value in values.items())}"
        for title, values in groups.items()
        if values
    ]
