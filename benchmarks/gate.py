"""One side of a comparison in a process of its own: it does its work when told to, and says what it cost."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

MIB = 2**20


class Clock:
    """Seconds of work: this process's CPU time, or the time between two events on a GPU."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"

    def now(self) -> Any:
        """A point in time."""
        if not self.cuda:
            return time.process_time()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def since(self, start: Any) -> float:
        """Seconds from ``start`` to now."""
        if not self.cuda:
            return float(time.process_time() - start)
        end = self.now()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / 1000


class Memory:
    """MiB of this process: resident on a CPU, allocated by torch on a GPU."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"

    def forget(self) -> float:
        """Begin to watch for a new peak, and return what is taken now."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated() / MIB
        try:
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")  # see proc(5): resets the peak
        except OSError:
            return self.peak()  # the largest so far is the best guess
        return _of_status("VmRSS")

    def peak(self) -> float:
        """The largest since :meth:`forget`."""
        if self.cuda:
            return torch.cuda.max_memory_allocated() / MIB
        try:
            return _of_status("VmHWM")
        except OSError:
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _of_status(name: str) -> float:
    """A line of the process's status, in MiB."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


class Gate:
    """Stands between two steps: answers with the cost of the last one and waits for the word to go on.

    Args:
        device: ``cpu`` or ``cuda``.
    """

    def __init__(self, device: str) -> None:
        self.clock, self.memory = Clock(device), Memory(device)
        # Libraries print to standard output, so the answers get a descriptor of their own.
        self.answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self.start: Any = None
        self.parts: defaultdict[str, float] = defaultdict(float)
        self.loaded = 0.0

    def __call__(self) -> None:
        """End the step that is under way, and wait. Ends the process when told to stop."""
        if self.start is None:
            self.loaded = self.memory.forget()
            self.answer(ready=True)
        else:
            self.answer(step=self.clock.since(self.start), **self.parts)
        if sys.stdin.readline().strip() != "go":
            peak = self.memory.peak()
            self.answer(peak=peak, loaded=self.loaded, extra=peak - self.loaded)
            os._exit(0)
        self.parts.clear()
        self.start = self.clock.now()

    def repeat(self, work: Callable[[int], Any]) -> None:
        """Do ``work(number)`` at every word, until told to stop."""
        number = 0
        while True:
            self()
            work(number)
            number += 1

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Measure a part of the step."""
        start = self.clock.now()
        yield
        self.parts[name] += self.clock.since(start)

    def wrap(self, owner: Any, method: str, name: str, tokens: Callable[[Any], int]) -> None:
        """Measure the calls of ``owner.method`` as the part ``name``, and count the tokens that each returns."""
        original = getattr(owner, method)

        def measured(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                result = original(*args, **kwargs)
            self.parts["tokens"] += tokens(result)
            return result

        setattr(owner, method, measured)

    def answer(self, **values: Any) -> None:
        """Send a line of JSON."""
        print(json.dumps(values), file=self.answers, flush=True)
