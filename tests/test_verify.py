"""Verifiers that fail in every way: the run goes on, and the failure is counted and named."""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from verifier_tasks import Misbehaving, Trusted

from lit_rlvr.rewards import MathVerify
from lit_rlvr.tasks import ProblemFiles, Prompt, Score, Task
from lit_rlvr.verify import Verdicts, Verifier

pytestmark = pytest.mark.timeout(60)
FAILED = Score(0.0, False)


@pytest.fixture(scope="module")
def pool() -> Iterator[Verifier]:
    """Two processes with three seconds per answer; the tests that use it share them."""
    verifier = Verifier(Misbehaving(), workers=2, timeout=3.0)
    yield verifier
    verifier.close()


def judge(verifier: Verifier, *responses: str) -> Verdicts:
    """Score responses to one prompt."""
    return verifier([Prompt(0, "?")] * len(responses), responses)


def alive(process: int) -> bool:
    """Whether a process runs, after some patience for one that is ending."""
    for _ in range(50):
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return False
        time.sleep(0.1)
    return True


@pytest.mark.parametrize("task", [Misbehaving(), Trusted()])
def test_scores_come_in_the_order_of_the_answers(task: Task) -> None:
    """Slow answers first, more answers than processes."""
    responses = ["sleep 0.3", "a", "sleep 0.1", *"bcdef"]
    verifier = Verifier(task, workers=2)
    verdicts = judge(verifier, *responses)
    verifier.close()
    assert verdicts.scores == [Score(0.5, True, response) for response in responses]
    assert not verdicts.failures


def test_where_answers_are_judged(pool: Verifier) -> None:
    """Trusted tasks in this process, others elsewhere."""
    assert judge(Verifier(Trusted()), "pid").scores[0].answer == str(os.getpid())
    assert judge(pool, "pid").scores[0].answer != str(os.getpid())


def without_line(reason: str) -> str:
    """A failure with the name of the file that it comes from alone."""
    return re.sub(r"\((?:\S*/)?(\w+\.py):\d+\)", r"(\1)", reason)


def told(verdicts: Verdicts) -> dict[str, int]:
    """The failures, without folders and line numbers."""
    return {without_line(reason): times for reason, times in verdicts.failures.items()}


@pytest.mark.parametrize("trusted", [False, True])
@pytest.mark.parametrize(
    ("response", "reason"),
    [
        ("raise it", "ValueError: cannot read it (verifier_tasks.py)"),
        ("none", "TypeError: the verifier returned NoneType, expected a Score"),
        ("number", "TypeError: the verifier returned float, expected a Score"),
        ("reward nan", "ValueError: the verifier returned the reward nan"),
        ("reward -inf", "ValueError: the verifier returned the reward -inf"),
        ("text", "TypeError: bad operand type for abs(): 'str'"),
    ],
)
def test_a_failure_is_a_wrong_answer_that_is_counted(
    trusted: bool, response: str, reason: str, pool: Verifier, caplog: pytest.LogCaptureFixture
) -> None:
    """The others keep their scores; the log says how often and why, in one line."""
    verifier = Verifier(Trusted()) if trusted else pool
    with caplog.at_level(logging.WARNING):
        verdicts = judge(verifier, "good", response, response, "fine")
    assert verdicts.scores == [Score(0.5, True, "good"), FAILED, FAILED, Score(0.5, True, "fine")]
    assert told(verdicts) == {reason: 2}
    assert [without_line(m) for m in caplog.messages] == [f"verifier failed on 2 of 4 answers: {reason}"]


def test_a_verifier_that_hangs_is_killed(tmp_path: Path) -> None:
    """Also one that ignores a polite request; the answers behind it are judged."""
    note = tmp_path / "process"
    verifier = Verifier(Misbehaving(), workers=1, timeout=0.5)
    try:
        verdicts = judge(verifier, "good", f"hang {note}", "fine")
        assert verdicts.scores == [Score(0.5, True, "good"), FAILED, Score(0.5, True, "fine")]
        assert verdicts.failures == {"no verdict within 0.5 s": 1}
        assert not alive(int(note.read_text()))
    finally:
        verifier.close()


def test_a_verifier_that_ends_its_process(pool: Verifier) -> None:
    """Both processes die, others take their places, now and for the next batch."""
    verdicts = judge(pool, "die", "good", "die", "die", "fine")
    assert [score.correct for score in verdicts.scores] == [False, True, False, False, True]
    assert verdicts.failures == {"ProcessExpired: Abnormal termination": 3}
    assert judge(pool, "good").scores == [Score(0.5, True, "good")]


def test_signals_to_every_process_change_no_verdict(pool: Verifier, tmp_path: Path) -> None:
    """A scheduler's warning is ignored; after SIGTERM, another process judges the answer again."""
    responses = ["good", f"terminated {tmp_path / 'once'}", "warned", "fine"]
    verdicts = judge(pool, *responses)
    assert verdicts.scores == [Score(0.5, True, response) for response in responses]
    assert not verdicts.failures


@pytest.mark.parametrize("trusted", [False, True])
def test_a_verifier_that_calls_exit(trusted: bool) -> None:
    """``sys.exit`` in a verifier does not end the run."""
    verifier = Verifier(Trusted() if trusted else Misbehaving())
    try:
        verdicts = judge(verifier, "good", "exit")
    finally:
        verifier.close()
    assert verdicts.scores == [Score(0.5, True, "good"), FAILED]
    assert told(verdicts) == {"SystemExit: 3 (verifier_tasks.py)": 1}


def test_a_verifier_whose_exception_cannot_travel() -> None:
    """It is that answer's failure; the other answers and the next batch are judged."""
    verifier = Verifier(Misbehaving(), workers=1)
    try:
        verdicts = judge(verifier, "good", "odd", "fine")
        assert verdicts.scores == [Score(0.5, True, "good"), FAILED, Score(0.5, True, "fine")]
        assert judge(verifier, "good").scores == [Score(0.5, True, "good")]
    finally:
        verifier.close()


@pytest.mark.parametrize("trusted", [False, True])
def test_all_failures_end_the_run(trusted: bool, pool: Verifier) -> None:
    """Nothing can be learnt from that; the commonest reason is named."""
    verifier = Verifier(Trusted()) if trusted else pool
    message = "the verifier failed on all 3 answers; 2 times with ValueError: cannot read this"
    with pytest.raises(RuntimeError, match=message):
        judge(verifier, "raise this", "none", "raise this")
    assert judge(verifier) == Verdicts([], judge(verifier, "good").failures)


def test_close_ends_the_processes() -> None:
    """A closed verifier may be closed again, and starts afresh when it is used."""
    verifier = Verifier(Misbehaving(), workers=1)
    (first,) = judge(verifier, "pid").scores
    assert first.answer is not None
    verifier.close()
    verifier.close()
    assert not alive(int(first.answer))
    (second,) = judge(verifier, "pid").scores
    verifier.close()
    assert second.answer not in (None, first.answer)


@pytest.mark.parametrize("task", [Misbehaving(), Trusted()])
def test_one_prompt_per_answer(task: Task) -> None:
    """A missing prompt is a mistake of the caller, not a verifier's failure."""
    verifier = Verifier(task, workers=1)
    with pytest.raises(ValueError, match="argument 2 is longer"):
        verifier([Prompt(0, "?")], ["a", "b"])
    verifier.close()


@pytest.mark.parametrize(("workers", "timeout"), [(0, 1.0), (1, 0.0), (1, -1.0)])
def test_numbers_that_are_not_positive_are_refused(workers: int, timeout: float) -> None:
    """Both are named."""
    with pytest.raises(ValueError, match=f"workers and timeout must be positive, got {workers} and {timeout}"):
        Verifier(Misbehaving(), workers, timeout)


@pytest.mark.parametrize("in_main_thread", [True, False])
def test_mathematics_that_takes_for_ever(in_main_thread: bool, tmp_path: Path) -> None:
    """math-verify's own timers work in a main thread only, so its process is killed; the other answers are judged."""
    (tmp_path / "problems.jsonl").write_text('{"question": "6*7?", "answer": "42"}')
    task = ProblemFiles(str(tmp_path / "problems.jsonl"), {"maths": MathVerify()}, val_share=0.0)
    verifier = Verifier(task, workers=2, timeout=2.5)
    responses = [r"\boxed{\frac{84}{2}}", r"\boxed{9^{9^{9^{9}}}}", r"\boxed{(10^{9})!}", r"\boxed{41}"]
    found: list[Verdicts] = []
    thread = threading.Thread(target=lambda: found.append(verifier(list(task.prompts("train")) * 4, responses)))
    try:
        if in_main_thread:
            thread.run()
        else:
            thread.start()
            thread.join()
    finally:
        verifier.close()
    right, wrong = Score(1.0, True, r"\frac{84}{2}", {"maths": 1.0}), Score(0.0, False, "41", {"maths": 0.0})
    assert found[0].scores == [right, FAILED, FAILED, wrong]
    assert found[0].failures == {"no verdict within 2.5 s": 2}
