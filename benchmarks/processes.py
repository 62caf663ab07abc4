"""Programs of this package in processes of their own, with one thread."""

from __future__ import annotations

import contextlib
import os
import runpy
import signal
import subprocess
import sys
import traceback
from typing import IO, Any, Protocol

THREADS = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
QUIET = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
CARDS = "CUDA_VISIBLE_DEVICES"


class Process(Protocol):
    """What is needed of ``subprocess.Popen``."""

    stdin: IO[str] | None
    stdout: IO[str] | None
    stderr: IO[str] | None

    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def kill(self) -> None: ...


class Forked:
    """A copy of this process that runs a program: it need not import what this one has imported.

    For a test of the benchmarks alone: what was loaded before counts as the side's own.

    Args:
        program: A module of this package.
        arguments: Its command line.
        environment: More environment variables.
    """

    def __init__(self, program: str, arguments: list[str], environment: dict[str, str]) -> None:
        (out, said), (answered, into), (failed, errors) = os.pipe(), os.pipe(), os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            for mine, number in ((out, 0), (into, 1), (errors, 2)):
                os.dup2(mine, number)
            os.environ.update(environment)
            sys.argv = [program, *arguments]
            sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")
            _run(program)
        for theirs in (out, into, errors):
            os.close(theirs)
        self.stdin, self.stdout, self.stderr = os.fdopen(said, "w"), os.fdopen(answered), os.fdopen(failed)
        self.code: int | None = None

    def poll(self) -> int | None:
        """The exit status, if it has ended."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code

    def wait(self, timeout: float | None = None) -> int:
        """The exit status, once it has ended; the parent of a test kills what takes too long."""
        if self.code is None:
            self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.code

    def kill(self) -> None:
        """End it."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)


def _run(program: str) -> None:
    """Run a program of this package as the whole of this process."""
    code = 1
    try:
        runpy.run_module(f"benchmarks.{program}", run_name="__main__")
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def first_card() -> str:
    """The one GPU that programs see: TRL refuses to train in one process that sees several."""
    return os.environ.get(CARDS, "0").split(",")[0]


class Launcher:
    """How programs are started."""

    forks = False

    def __call__(self, program: str, *arguments: str, environment: dict[str, str] | None = None) -> Any:
        """Start a program of this package."""
        if self.forks:
            return Forked(program, list(arguments), environment or {})
        return subprocess.Popen(
            [sys.executable, "-m", f"benchmarks.{program}", *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, **THREADS, **QUIET, CARDS: first_card(), **(environment or {})},
        )  # fmt: skip

    def fork_from_here(self) -> None:
        """From now on programs are copies of this process, which imports everything once."""
        import torch

        torch.set_num_threads(1)  # a pool of threads would not survive the copying
        os.environ.update(THREADS | QUIET)
        for program in ("ours", "theirs", "head_side", "memory_side"):
            __import__(f"benchmarks.{program}")
        self.forks = True


launch = Launcher()
"""Starts every program."""
