"""Evaluation metrics: mean@n, unbiased pass@k and maj@n, exact over any split of the prompts on ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import comb
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lit_rlvr.engines import Generation
from lit_rlvr.tasks import Score


class PerPrompt(Metric):
    """A mean over prompts of one number per prompt."""

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, values: Sequence[float]) -> None:
        """Add one number per prompt."""
        self.total += sum(values)
        self.count += len(values)

    def compute(self) -> Tensor:
        """The mean; NaN before the first update."""
        return self.total / self.count


def pass_at_k(right: int, n: int, k: int) -> float:
    """Probability that at least one of ``k`` of the ``n`` responses, drawn without replacement, is right.

    Source: Chen et al. 2021 (arXiv 2107.03374), Eq. 1.

    >>> pass_at_k(1, 4, 1), pass_at_k(1, 4, 4)
    (0.25, 1.0)
    """
    return 1.0 - comb(n - right, k) / comb(n, k)


def maj_at_n(scores: Sequence[Score]) -> float:
    """Probability that the most frequent answer is right; ties are broken at random, no answer has no vote.

    >>> maj_at_n([Score(1, True, "7"), Score(0, False, "3"), Score(0, False)])
    0.5
    """
    votes = Counter(s.answer for s in scores if s.answer is not None)
    if not votes:
        return 0.0
    most = max(votes.values())
    winners = [answer for answer, count in votes.items() if count == most]
    # Whether an answer is right is a property of the answer; verifiers that disagree with themselves are averaged.
    verdicts = [[s.correct for s in scores if s.answer == winner] for winner in winners]
    return sum(sum(v) / len(v) for v in verdicts) / len(winners)


class EvaluationMetrics(torch.nn.Module):
    """All metrics of one evaluation of ``samples`` responses per prompt.

    Args:
        samples: Responses per prompt n.
        k: The values of k for pass@k; none above n.

    Raises:
        ValueError: For a k that n does not allow.
    """

    def __init__(self, samples: int, k: Sequence[int]) -> None:
        super().__init__()
        if bad := [x for x in k if not 1 <= x <= samples]:
            raise ValueError(f"pass@{bad[0]} needs 1 <= k <= samples, and there are {samples} samples per prompt")
        self.samples, self.k = samples, tuple(k)
        names = [f"mean_at_{samples}", *(f"pass_at_{x}" for x in k), *([f"maj_at_{samples}"] if samples > 1 else [])]
        self.metrics = torch.nn.ModuleDict({n: PerPrompt() for n in [*names, "length", "truncated", "entropy"]})

    def update(self, scores: Sequence[Score], generation: Generation) -> None:
        """Add whole groups: ``samples`` rows per prompt, side by side."""
        n = self.samples
        groups = [scores[i : i + n] for i in range(0, len(scores), n)]
        right = [sum(s.correct for s in group) for group in groups]
        values: dict[str, list[float]] = {f"mean_at_{n}": [r / n for r in right]}
        values |= {f"pass_at_{k}": [pass_at_k(r, n, k) for r in right] for k in self.k}
        if n > 1:
            values[f"maj_at_{n}"] = [maj_at_n(group) for group in groups]
        values["length"] = generation.mask.sum(-1).tolist()
        values["truncated"] = generation.truncated.float().tolist()
        if generation.entropies is not None:
            values["entropy"] = generation.entropies[generation.mask].tolist()
        for name, numbers in values.items():
            metric = self.metrics[name]
            assert isinstance(metric, PerPrompt)
            metric.update(numbers)

    def compute(self) -> dict[str, float]:
        """All metrics over all ranks, and start afresh. Metrics without a number are left out."""
        out = {}
        for name, metric in self.metrics.items():
            assert isinstance(metric, PerPrompt)
            value = float(metric.compute())
            metric.reset()
            if value == value:
                out[name] = value
        return out
