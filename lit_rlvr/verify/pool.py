"""Scores answers, in separate processes where the task asks for it: a verifier can neither hang nor kill the run."""

from __future__ import annotations

import logging
import multiprocessing
import signal
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lit_rlvr.blame import frames_of_user, place
from lit_rlvr.tasks.base import Prompt, Score, Task

log = logging.getLogger(__name__)

_task: Task | None = None


def _start_worker(task: Task) -> None:
    global _task
    _task = task
    if hasattr(signal, "SIGUSR1"):  # a scheduler's warning, which goes to all processes and would end this one
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def _score_in_worker(prompt: Prompt, response: str) -> Score | str:
    assert _task is not None
    return _score(_task, prompt, response)


def _score(task: Task, prompt: Prompt, response: str) -> Score | str:
    """A score, or why there is none. Whatever a verifier does is its failure, not the run's: ``sys.exit`` too."""
    try:
        return _checked(task.score(prompt, response))
    except (Exception, SystemExit) as error:
        return describe(error)


def _checked(score: Any) -> Score:
    if not isinstance(score, Score):
        raise TypeError(f"the verifier returned {type(score).__name__}, expected a Score")
    if not abs(score.reward) < float("inf"):
        raise ValueError(f"the verifier returned the reward {score.reward}")
    return score


@dataclass(frozen=True)
class Verdicts:
    """Scores of a batch of answers.

    Args:
        scores: One per answer; a failed verifier leaves reward 0 and a wrong outcome.
        failures: Why verifiers failed, with how often.
    """

    scores: list[Score]
    failures: Counter[str]


class Verifier:
    """Scores answers for a task.

    Args:
        task: The task; ``task.isolated`` decides between this process and a pool.
        workers: Processes of the pool.
        timeout: Seconds that one answer may take in the pool; its process is killed after that.

    Raises:
        ValueError: When ``workers`` or ``timeout`` is not positive.
    """

    def __init__(self, task: Task, workers: int = 2, timeout: float = 10.0) -> None:
        if workers < 1 or timeout <= 0:
            raise ValueError(f"verifier workers and timeout must be positive, got {workers} and {timeout}")
        self.task, self.workers, self.timeout = task, workers, timeout
        self._pool: Any = None

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Verdicts:
        """Score ``responses``, one per prompt.

        Raises:
            RuntimeError: When the verifier fails on every answer: nothing could be learnt from that.
        """
        judge = self._in_pool if self.task.isolated else self._here
        results = judge(prompts, responses)
        failures = Counter(r for r in results if isinstance(r, str))
        if responses and failures.total() == len(responses):
            reason, times = failures.most_common(1)[0]
            raise RuntimeError(f"the verifier failed on all {len(responses)} answers; {times} times with {reason}")
        for reason, times in failures.items():
            log.warning("verifier failed on %d of %d answers: %s", times, len(responses), reason)
        return Verdicts([Score(0.0, False) if isinstance(r, str) else r for r in results], failures)

    def close(self) -> None:
        """End the pool's processes."""
        if self._pool is not None:
            self._pool.stop()
            self._pool.join()
            self._pool = None

    def _here(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Score | str]:
        return [_score(self.task, *pair) for pair in zip(prompts, responses, strict=True)]

    def _in_pool(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Score | str]:
        from pebble import ProcessPool

        if self._pool is None:
            # spawn: a fork of a process with torch's threads can deadlock.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPool(self.workers, context=context, initializer=_start_worker, initargs=(self.task,))
        pairs = list(zip(prompts, responses, strict=True))
        futures = [self._schedule(pair) for pair in pairs]
        return [self._verdict(future, pair) for future, pair in zip(futures, pairs, strict=True)]

    def _schedule(self, pair: tuple[Prompt, str]) -> Any:
        return self._pool.schedule(_score_in_worker, args=pair, timeout=self.timeout)

    def _verdict(self, future: Any, pair: tuple[Prompt, str], again: bool = True) -> Score | str:
        """The outcome of a scheduled answer.

        A scheduler that wants the machine back sends SIGTERM to every process. The run goes on for a while, and must
        not take that for a verifier's failure: the answer is judged again, once.
        """
        try:
            verdict: Score | str = future.result()
        except TimeoutError:
            return f"no verdict within {self.timeout:g} s"
        except Exception as error:  # the worker's death, or a task that cannot travel to it
            if again and abs(getattr(error, "exitcode", 0)) == signal.SIGTERM:  # workers exit with the signal's number
                return self._verdict(self._schedule(pair), pair, again=False)
            return describe(error)
        return verdict


def describe(error: BaseException) -> str:
    r"""An exception in one line, with the line of the user's own file that it comes from.

    >>> describe(ValueError("no\nanswer"))
    'ValueError: no answer'
    """
    frames = frames_of_user(error)
    where = f" ({place(frames[-1])})" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200] + where
