"""What a difference between two arms is worth: paired by seed, with Student's t."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Literal

ROUNDING = 1e-9
"""Differences that are equal to this share of the values are equal."""

Better = Literal["higher", "lower"] | None
"""Which values of a measure are better; None: neither."""


@dataclass(frozen=True)
class Summary:
    """Number, mean and standard deviation (n - 1 in the denominator) of the values of an arm.

    ``mean`` is None without a value, ``sd`` with fewer than two.
    """

    n: int
    mean: float | None
    sd: float | None


@dataclass(frozen=True)
class Difference:
    """Mean of arm minus baseline over ``n`` seeds that both have, with a confidence interval.

    ``low`` and ``high`` are None where there is no spread to estimate one from: with one seed, or equal differences.
    """

    n: int
    mean: float
    low: float | None
    high: float | None


def summarise(values: Iterable[float]) -> Summary:
    """Number, mean and standard deviation.

    >>> summarise([1.0, 2.0, 3.0])
    Summary(n=3, mean=2.0, sd=1.0)
    """
    found = list(values)
    mean = statistics.fmean(found) if found else None
    return Summary(len(found), mean, statistics.stdev(found) if len(found) > 1 else None)


def paired_difference(
    arm: Mapping[int, float], baseline: Mapping[int, float], confidence: float = 0.95
) -> Difference | None:
    """Mean difference d of the pairs, and d ± t · s / √n with n - 1 degrees of freedom.

    Pairing removes what a seed does to both arms alike. Measures are coarse (shares of a few hundred problems, whole
    steps), so a few differences may well be equal. No interval is given then: one of no width would claim certainty.

    Args:
        arm: Value by seed.
        baseline: Value by seed.
        confidence: Probability that such an interval holds the true mean, if differences are normally distributed.

    Returns:
        None when no seed has both values.
    """
    from scipy.special import stdtrit

    pairs = [arm[seed] - baseline[seed] for seed in sorted(arm.keys() & baseline.keys())]
    if not pairs:
        return None
    mean = statistics.fmean(pairs)
    largest = max(abs(values[seed]) for values in (arm, baseline) for seed in arm.keys() & baseline.keys())
    if max(pairs) - min(pairs) <= ROUNDING * largest:
        return Difference(len(pairs), mean, None, None)
    quantile = float(stdtrit(len(pairs) - 1, (1 + confidence) / 2))
    half = quantile * statistics.stdev(pairs) / sqrt(len(pairs))
    return Difference(len(pairs), mean, mean - half, mean + half)


def verdict(difference: Difference | None, better: Better) -> str:
    """The difference in words.

    >>> verdict(Difference(3, 0.2, 0.1, 0.3), "higher"), verdict(Difference(3, 0.2, -0.1, 0.5), "higher")
    ('better', 'no difference found')
    """
    if difference is None:
        return "no seed in common"
    if difference.low is None or difference.high is None:
        if difference.n == 1:
            return "one seed: no interval"
        return "no difference found" if difference.mean == 0 else "the same in every pair: no interval"
    if difference.low <= 0 <= difference.high:
        return "no difference found"
    direction = "higher" if difference.mean > 0 else "lower"
    if better is None:
        return direction
    return "better" if direction == better else "worse"
