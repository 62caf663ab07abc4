"""Drawing tokens as captured graphs: random numbers, the sampler and its log-probabilities in one launch."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from lit_rlvr.engines.base import Sampling
from lit_rlvr.engines.capture import CaptureError, Recorder
from lit_rlvr.engines.graphs import RowGraphs
from lit_rlvr.engines.sampler import Drawn, draw_named

log = logging.getLogger(__name__)


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
        self.graphs: RowGraphs | None = RowGraphs(slots, recorder)

    def __call__(self, logits: Tensor, name: Tensor, sampling: Sampling, seed: int) -> Drawn:
        """See :func:`lit_rlvr.engines.sampler.draw_named`; what is returned is valid until the next call."""
        assert (sampling, seed) == (self.sampling, self.seed)
        if self.graphs is None or not self._run(self.graphs, logits, name):
            self.graphs = None
            return draw_named(logits, name, sampling, seed)
        return Drawn(*(fact[: len(logits)] for fact in self.drawn))

    def _run(self, graphs: RowGraphs, logits: Tensor, name: Tensor) -> bool:
        """Whether it could be done with graphs."""
        rows = len(logits)
        if logits.data_ptr() != self.logits.data_ptr():
            self.logits[:rows] = logits
        self.name[:rows] = name
        try:
            graphs(self._draw, rows)
        except CaptureError as error:
            log.warning("%s; this rollout goes on without", error)
            return False
        return True

    def _draw(self, rows: int) -> None:
        """What is captured."""
        drawn = draw_named(self.logits[:rows], self.name[:rows], self.sampling, self.seed)
        for mine, fact in zip(self.drawn, drawn, strict=True):
            mine[:rows].copy_(fact)
