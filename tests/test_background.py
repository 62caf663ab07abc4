"""Calls in threads that nobody waits for."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import CancelledError

import pytest

from lit_rlvr.engines.background import Background

HANGS = """
from threading import Event
from lit_rlvr.engines.background import Background
with Background(1) as threads:
    threads.submit(Event().wait)
    raise SystemExit(3)
"""


def test_results_and_failures_are_those_of_the_calls() -> None:
    with Background(2) as threads:
        calls = [threads.submit(divmod, 7, by) for by in (2, 0, 3)]
        assert calls[0].result() == (3, 1)
        assert calls[2].result() == (2, 1)
        with pytest.raises(ZeroDivisionError):
            calls[1].result()


def test_no_more_than_so_many_run_at_a_time() -> None:
    """And all of those do: each waits for the other."""
    together, most, now = threading.Barrier(2), list[int](), set[int]()

    def call(number: int) -> None:
        now.add(number)
        most.append(len(now))
        together.wait(timeout=60)
        now.discard(number)

    with Background(2) as threads:
        for done in [threads.submit(call, number) for number in range(8)]:
            done.result()
    assert max(most) == 2


def test_what_has_not_begun_is_cancelled_and_threads_end() -> None:
    before, begun, end = set(threading.enumerate()), threading.Event(), threading.Event()
    with Background(1) as threads:
        first, second = threads.submit(lambda: (begun.set(), end.wait())), threads.submit(print)
        begun.wait()
    with pytest.raises(CancelledError):
        second.result()
    end.set()
    first.result()
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=60)
        assert not thread.is_alive()


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_call_that_hangs_does_not_keep_a_process_alive() -> None:
    assert subprocess.run([sys.executable, "-c", HANGS], check=False, timeout=180).returncode == 3
