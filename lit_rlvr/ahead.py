"""One step off policy: the next phase's responses are sampled while the current phase's are learnt from."""

from __future__ import annotations

import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.callbacks import Callback

from lit_rlvr.collect import Responses, Tally
from lit_rlvr.engines import Engine
from lit_rlvr.reduce import Reduce, on_every_rank

if TYPE_CHECKING:
    from lit_rlvr.module import RLVRModule

log = logging.getLogger(__name__)


class LookAhead(Callback):
    """Samples the first round of the next phase in a thread, with the weights that the current phase was sampled with.

    A phase asks its prompts of the servers as soon as the phase before it has been sampled, so its responses come from
    weights that are one phase of updates old: :class:`~lit_rlvr_callbacks.TruncatedImportance` corrects for that, and
    ``rollout/lag_updates`` says how old. The rounds that dynamic sampling adds are sampled with current weights.

    The thread only asks servers: it makes no collective, draws no random number, and verifies nothing. It has ended
    before servers get other weights, so before the next phase and before every evaluation. Prompts are looked at, and
    drawn when their phase begins; a run that is resumed from a checkpoint draws the same prompts, and samples its
    first phase with current weights, because what was sampled ahead is in no checkpoint. A run that stops gives up what
    it has asked for.
    """

    def __init__(self) -> None:
        self._future: Future[Responses] | None = None
        self._engine: Engine | None = None
        self._version = 0
        self._ready: Responses | None = None
        self._waited = 0.0

    def begin(self, module: RLVRModule, phase: int, reduce: Reduce) -> None:
        """Sample this rank's share of ``phase``'s first round in a thread, unless training ends before it.

        Every rank calls it, once the phase before has drawn all of its prompts.
        """
        step, last = module.trainer.global_step, module.trainer.estimated_stepping_batches
        if 0 < last <= step + module.batch.steps_per_phase:
            return
        collector = module.collector
        prompts, draws = collector.share(module.data.peek(module.batch.prompts), 0, reduce)
        self._engine, self._version = module.engine, step
        with_thread = ThreadPoolExecutor(1, thread_name_prefix="lit-rlvr-ahead")
        self._future = with_thread.submit(collector.ask, module.policy, prompts, draws, phase)
        with_thread.shutdown(wait=False)

    def wait(self, reduce: Reduce) -> None:
        """Return when all ranks have what they sampled ahead; every rank calls it before servers get other weights.

        Raises:
            Exception: On every rank, what went wrong in the thread of one.
        """
        if self._future is None:
            return
        started = time.perf_counter()
        future, self._future = self._future, None

        def end() -> None:
            self._ready = future.result()

        on_every_rank(end, reduce)
        self._waited += time.perf_counter() - started

    def take(self, step: int) -> Responses | None:
        """What was sampled ahead for the phase that begins after ``step`` optimiser steps, if anything was."""
        ready, self._ready = self._ready, None
        return ready and replace(ready, lag=step - self._version)

    def metrics(self, tally: Tally, reduce: Reduce) -> dict[str, float]:
        """How old the weights were that a phase's responses were sampled with, and how long was waited since the last.

        Every rank calls it.
        """
        own = torch.tensor([tally.sums["lag"], tally.sums["responses"]], dtype=torch.float64)
        lag, responses = reduce.sum(own).tolist()
        seconds, self._waited = self._waited, 0.0
        return {"rollout/lag_updates": lag / max(responses, 1.0), "time/wait_s": seconds}

    def cancel(self) -> None:
        """Forget what is being sampled, and have the servers forget it."""
        if self._future is not None and self._engine is not None and not self._future.done():
            self._engine.cancel()
            problem = self._future.exception()
            log.info("what was sampled ahead is given up%s", f" ({problem})" if problem else "")
        self._future = self._ready = self._engine = None

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.cancel()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.cancel()
