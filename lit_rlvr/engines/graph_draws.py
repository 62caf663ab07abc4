"""Drawing tokens as captured graphs: random numbers, the sampler and its log-probabilities in one launch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lit_rlvr.engines.base import Sampling
from lit_rlvr.engines.capture import Recorder
from lit_rlvr.engines.graphs import RowGraphs
from lit_rlvr.engines.sampler import Drawn, draw_named


class DrawGraphs:
    """Captured draws of one rollout.

    Args:
        logits: Memory for the logits [slots, V]; those that are already there are not copied.
        sampling: Temperature and truncation.
        seed: The run's seed.
        recorder: Makes a recorder.
    """

    def __init__(self, logits: Tensor, sampling: Sampling, seed: int, recorder: Callable[[], Recorder]) -> None:
        slots, device = len(logits), logits.device
        self.logits, self.sampling, self.seed = logits, sampling, seed
        self.name = torch.zeros(slots, 4, dtype=torch.int64, device=device)
        self.drawn = draw_named(torch.zeros_like(logits), self.name, sampling, seed)
        self.graphs = RowGraphs(self._draw, slots, recorder)

    def __call__(self, logits: Tensor, name: Tensor, sampling: Sampling, seed: int) -> Drawn:
        """See :func:`lit_rlvr.engines.sampler.draw_named`; what is returned is valid until the next call."""
        assert (sampling, seed) == (self.sampling, self.seed)
        rows = len(logits)
        if logits.data_ptr() != self.logits.data_ptr():
            self.logits[:rows] = logits
        self.name[:rows] = name
        self.graphs(rows)
        return Drawn(*(fact[:rows] for fact in self.drawn))

    def _draw(self, rows: int) -> None:
        """What is captured."""
        drawn = draw_named(self.logits[:rows], self.name[:rows], self.sampling, self.seed)
        for mine, fact in zip(self.drawn, drawn, strict=True):
            mine[:rows].copy_(fact)
