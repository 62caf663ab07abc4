"""One side of a comparison in a process of its own: it runs a step when told to, and says what the step cost."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


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
            return time.process_time() - start
        end = self.now()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / 1000


class Gate:
    """Stands between two steps: answers with the cost of the last one and waits for the word to go on.

    Args:
        device: ``cpu`` or ``cuda``.
    """

    def __init__(self, device: str) -> None:
        self.clock = Clock(device)
        # Libraries print to standard output, so the answers get a descriptor of their own.
        self.answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self.start: Any = None
        self.parts: defaultdict[str, float] = defaultdict(float)
        self.loaded = 0.0

    def __call__(self) -> None:
        """End the step that is under way, and wait. Ends the process when told to stop."""
        if self.start is None:
            self.loaded = self.memory()
            self.answer(ready=True)
        else:
            self.answer(step=self.clock.since(self.start), **self.parts)
        if sys.stdin.readline().strip() != "go":
            self.answer(peak=self.memory(), loaded=self.loaded)
            os._exit(0)
        self.parts.clear()
        self.start = self.clock.now()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Measure a part of the step."""
        start = self.clock.now()
        yield
        self.parts[name] += self.clock.since(start)

    def wrap(self, owner: Any, method: str, name: str) -> None:
        """Measure the calls of ``owner.method`` as the part ``name``."""
        original = getattr(owner, method)

        def measured(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return original(*args, **kwargs)

        setattr(owner, method, measured)

    def memory(self) -> float:
        """Peak memory so far in MiB: resident on a CPU, allocated by torch on a GPU."""
        if self.clock.cuda:
            return torch.cuda.max_memory_allocated() / 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    def answer(self, **values: Any) -> None:
        """Send a line of JSON."""
        print(json.dumps(values), file=self.answers, flush=True)
