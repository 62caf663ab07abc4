"""Decoding steps as captured graphs.

Tokens, positions and the column that is written lie in tensors that stay where they are, and attention reads the whole
storage behind a mask. A graph is valid for one width of the storage. Rows that are not in use compute something finite,
in slots that are not in use.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import Cache

from lit_rlvr.engines.capture import CaptureError, Recorder
from lit_rlvr.engines.graphs import RowGraphs
from lit_rlvr.engines.slots import SlotCache, WholeLayer
from lit_rlvr.policy import Policy

log = logging.getLogger(__name__)


class StepGraphs:
    """Captured decoding steps of one rollout.

    Args:
        policy: The policy, whose weights stay where they are.
        cache: Its keys and values; no layer has a window.
        like: Logits of any step [n, V], for their dtype.
        recorder: Makes a recorder.
    """

    def __init__(self, policy: Policy, cache: SlotCache, like: Tensor, recorder: Callable[[], Recorder]) -> None:
        slots, device = cache.slots[0].slots, like.device
        self.policy, self.cache = policy, cache
        self.token, self.position = (torch.zeros(slots, 1, dtype=torch.int64, device=device) for _ in range(2))
        self.column = torch.zeros(1, dtype=torch.int64, device=device)
        self.logits = like.new_zeros(slots, like.shape[-1])
        self.width = cache.width
        self.graphs = RowGraphs(slots, recorder)

    def next_logits(self, token: Tensor, position: Tensor) -> Tensor | None:
        """Extend the cache by ``token`` [n] at ``position`` [n].

        Returns:
            Logits [n, V], valid until the next step; or None, with the cache as it was, if they could not be captured.
        """
        logits = self._run(token, position, self.cache.extend())
        if logits is None:
            for layer in self.cache.slots:
                layer.high -= 1
                layer.use(layer.rows, layer.length - 1)
        return logits

    def agrees(self, token: Tensor, position: Tensor, logits: Tensor) -> bool:
        """Whether a step that was just taken without graphs has the same ``logits`` [n, V] with them.

        The same sums in another order: each of many layers rounds by 2^-8 in bfloat16, by 2^-11 where TF32 is allowed.
        Attention to wrong columns changes a good part of the logits. If they differ, or could not be captured, the
        cache stays as it was.
        """
        column = self.cache.slots[0].high - 1
        parts = [storage[:, :, column] for layer in self.cache.slots for storage in layer.storage]
        before = [part.clone() for part in parts]
        again = self._run(token, position, column)
        tolerance = 1e-1 if any(part.dtype.itemsize < 4 for part in parts) else 1e-2
        if again is not None:
            if _close(again, logits, tolerance):
                return True
            log.warning("captured steps do not give what the model does; this rollout is decoded without them")
        for part, old in zip(parts, before, strict=True):
            part.copy_(old)
        return False

    def _run(self, token: Tensor, position: Tensor, column: int) -> Tensor | None:
        rows = len(token)
        self.token[:rows, 0], self.position[:rows, 0] = token, position
        self.column.fill_(column)
        if self.width != self.cache.width:
            self.width = self.cache.width
            self.graphs.forget()
        try:
            self.graphs(self._step, rows)
        except CaptureError as error:
            log.warning("%s; this rollout goes on without", error)
            return None
        return self.logits[:rows]

    def _step(self, rows: int) -> None:
        """What is captured.

        A row's tokens are the ``position`` columns before the one that is written. Whatever was left behind in a row
        that is not in use, it sees that one, so that nothing is NaN.
        """
        position = self.position[:rows]
        places = torch.arange(self.width, device=position.device)
        seen = (places >= self.column - position) & (places <= self.column)
        mask = torch.zeros(seen.shape, dtype=self.policy.hf.dtype, device=seen.device)
        mask = mask.masked_fill(~seen, -torch.inf)[:, None, None]
        cache = Cache(layers=[WholeLayer(layer, rows, self.column) for layer in self.cache.slots])
        with _uncached_autocast(position.device):
            self.logits[:rows].copy_(self.policy.next_logits(self.token[:rows], mask, position, cache))


def _close(got: Tensor, wanted: Tensor, tolerance: float) -> bool:
    """Whether each row of logits [n, V] is another but for a constant, up to a part of its norm."""
    got, wanted = (logits.double() - logits.double().mean(-1, keepdim=True) for logits in (got, wanted))
    return bool(((got - wanted).norm(dim=-1) <= tolerance * wanted.norm(dim=-1)).all())


@contextmanager
def _uncached_autocast(device: torch.device) -> Iterator[None]:
    """Autocast as it is, without its cache: a weight that is cast while capturing lies in the graph's own memory."""
    kind = device.type
    on = torch.is_autocast_enabled(kind)
    with torch.autocast(kind, torch.get_autocast_dtype(kind), enabled=on, cache_enabled=False):
        yield
