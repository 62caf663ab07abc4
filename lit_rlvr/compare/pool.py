"""Runs processes side by side, and leaves none behind."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from lit_rlvr.compare.runs import Run

GRACE = 10.0
"""Seconds that a process has to end after it was asked to."""
PAUSE = 0.05
"""Seconds between two looks at the processes."""


@dataclass
class _Process:
    run: Run
    handle: subprocess.Popen[bytes]
    started: float


class Pool:
    """Runs commands in processes of their own, each with its log file.

    Args:
        workers: Processes at the same time.
        threads: Threads of a process.
        lock: File descriptor of the comparison's lock, which processes inherit: as long as one lives, it is locked.
    """

    def __init__(self, workers: int, threads: int, lock: int) -> None:
        self.workers, self.lock = workers, lock
        self.environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}

    def work(self, runs: Sequence[Run], command: Callable[[Run], list[str]], ended: Callable[[Run], None]) -> None:
        """Run all; ``command`` is asked when a run begins, ``ended`` is told when it has ended, well or not.

        Whatever interrupts it, all processes are ended before it returns.
        """
        waiting, active = list(runs), list[_Process]()
        try:
            while waiting or active:
                while waiting and len(active) < self.workers:
                    active.append(self._start(waiting.pop(0), command))
                for process in [p for p in active if p.handle.poll() is not None]:
                    active.remove(process)
                    _signal(process.handle, signal.SIGKILL)  # what a crashed run may have left
                    process.run.end(process.handle.returncode, time.monotonic() - process.started)
                    ended(process.run)
                time.sleep(PAUSE if active else 0)
        finally:
            stop([process.handle for process in active])

    def _start(self, run: Run, command: Callable[[Run], list[str]]) -> _Process:
        run.begin()
        with run.log.open("wb") as log:
            # A session of its own: the terminal's Ctrl-C reaches us alone, and we can end all that the run has started.
            handle = subprocess.Popen(
                command(run), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=self.environment,
                start_new_session=True, pass_fds=(self.lock,),
            )  # fmt: skip
        return _Process(run, handle, time.monotonic())


def stop(handles: Sequence[subprocess.Popen[bytes]]) -> None:
    """End processes and what they have started: first asked, then forced."""
    for handle in handles:
        _signal(handle, signal.SIGTERM)
    deadline = time.monotonic() + GRACE
    for handle in handles:
        with suppress(subprocess.TimeoutExpired):
            handle.wait(max(0.0, deadline - time.monotonic()))
        _signal(handle, signal.SIGKILL)
        handle.wait()


def _signal(handle: subprocess.Popen[bytes], number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(handle.pid, number)


@contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Hold the folder's lock, so that no two comparisons write into it at once; yields its file descriptor.

    Raises:
        ValueError: When somebody else holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another `lit-rlvr compare`, or a run that one has left behind, is at work in {folder}"
            ) from None
        yield file.fileno()


@contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGTERM and SIGHUP do what Ctrl-C does; one that is ignored, as under nohup, stays so."""

    def interrupt(number: int, frame: object) -> NoReturn:
        raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler is signal.SIG_DFL:
            signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
