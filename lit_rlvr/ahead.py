"""Sampling one phase ahead: the next rollouts are drawn on a server while this phase's are learnt from."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lit_rlvr.types import EncodedPrompt, RolloutBatch

if TYPE_CHECKING:
    from lit_rlvr.collect import Collector, Tally


@dataclass(frozen=True)
class _Pending:
    """The first round of a phase, under way."""

    phase: int
    draws: list[int]
    tally: Tally
    rollout: Future[RolloutBatch]


class Ahead:
    """One round of sampling and verifying in a thread.

    The prompts are only looked at; they are drawn when their phase comes, so a run that is resumed meets the same ones.
    No reduction over ranks happens in the thread.

    Args:
        collector: Samples and verifies.
    """

    def __init__(self, collector: Collector) -> None:
        self.collector = collector
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rollouts")
        self._pending: _Pending | None = None

    def begin(self, policy: Any, prompts: list[EncodedPrompt], draws: list[int], phase: int, tally: Tally) -> None:
        """Begin to sample this rank's ``prompts``, which will be the ``draws`` of ``phase``."""
        assert self._pending is None
        job = self._thread.submit(self.collector.sample, policy, prompts, draws, phase, tally)
        self._pending = _Pending(phase, draws, tally, job)

    def take(self, phase: int, draws: list[int]) -> tuple[RolloutBatch, Tally] | None:
        """The first round of ``phase``, once it is done; None where another one, or none, was begun.

        Raises:
            Exception: Whatever went wrong in the thread.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        rollout = pending.rollout.result()
        return (rollout, pending.tally) if (pending.phase, pending.draws) == (phase, draws) else None

    def wait(self) -> None:
        """Wait until nothing is being sampled; an evaluation needs the server for itself."""
        if self._pending is not None:
            self._pending.rollout.exception()

    def close(self) -> None:
        """Wait for the thread and forget what it did."""
        self._thread.shutdown(wait=True)
        self._pending = None
