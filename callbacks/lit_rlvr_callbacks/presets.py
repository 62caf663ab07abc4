"""The published readings of entropy selection, as one set of options each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Reading:
    """Which entropies are compared with which, and what the loss is divided by.

    Args:
        source: Whose entropies: of the ``rollout`` engine, the ``old`` policy or the ``current`` one.
        scope: Among the tokens of a ``phase``, a ``mini_batch`` or a ``micro_batch``.
        ranks: Over all ranks (``global``) or on each alone (``local``).
        normalize: Divide by the ``selected`` tokens or by ``all``.
        rule: An ``exact`` number of tokens, or all that reach a ``quantile``.
        own_denominator: On a micro-batch, divide by its own tokens also where all of them count.
    """

    source: str
    scope: str
    ranks: str
    normalize: str
    rule: str
    own_denominator: bool = False


PRESETS = {
    "invariant": Reading("old", "phase", "global", "selected", "exact"),
    "paper_v2": Reading("current", "micro_batch", "local", "selected", "exact", own_denominator=True),
    "paper_v1": Reading("current", "micro_batch", "local", "all", "exact", own_denominator=True),
    "trl": Reading("current", "micro_batch", "global", "all", "quantile"),
}

CHOICES: dict[str, tuple[str, ...]] = {
    "select": ("top", "bottom", "band", "random"),
    "preset": tuple(PRESETS),
    "source": ("rollout", "old", "current"),
    "scope": ("phase", "mini_batch", "micro_batch"),
    "ranks": ("global", "local"),
    "normalize": ("selected", "all"),
    "rule": ("exact", "quantile"),
}
"""What each option of :class:`~lit_rlvr_callbacks.EntropyTopK` may be."""


def check_choices(options: dict[str, Any]) -> None:
    """Refuse words that are none of the choices, and choices that do not go together.

    Args:
        options: Every option in :data:`CHOICES`, and ``rho`` and ``band``.

    Raises:
        ValueError: Naming the option.
    """
    for name, known in CHOICES.items():
        if options[name] not in known:
            raise ValueError(f"EntropyTopK.{name} must be one of {', '.join(known)}, got {options[name]!r}")
    if options["source"] == "current" and options["scope"] == "phase":
        raise ValueError(
            "EntropyTopK.source must be old or rollout at scope: phase, because the current policy is only known in an "
            "optimiser step; or use scope: mini_batch or micro_batch"
        )
    if options["rule"] == "quantile" and options["select"] == "random":
        raise ValueError("EntropyTopK.rule must be exact with select: random, which compares no entropies")
    if (options["select"] == "band") != (options["band"] is not None):
        raise ValueError("EntropyTopK.band must be given with select: band, and with that alone")
    if options["select"] == "band" and options["rho"] is not None:
        raise ValueError("EntropyTopK.rho must be left out with select: band, whose width is the share")
    band = options["band"]
    if band is not None and (len(band) != 2 or not 0 <= band[0] < band[1] <= 1):
        raise ValueError(f"EntropyTopK.band must be [low, high] with 0 <= low < high <= 1, got {band}")
