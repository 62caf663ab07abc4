"""What is asked of CUDA when a function is captured, written down on a CPU, with torch's own signatures.

As in CUDA, whatever waits for the device while it is capturing fails, and then the capture's end fails too; it leaves
the current stream as it is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lit_rlvr.engines import capture


class FakeCuda:
    """Stands in for what :mod:`lit_rlvr.engines.capture` uses of ``torch.cuda``.

    Args:
        change: Undoes it.
        fails: What a capture's end raises, whatever has been captured; or its beginning.
        at_once: Whether it is the beginning.
    """

    def __init__(self, change: pytest.MonkeyPatch, fails: Exception | None = None, at_once: bool = False) -> None:
        self.log: list[str] = []
        self.fails, self.at_once = fails, at_once
        self.capturing, self.invalid, self.mode = False, False, 1
        stream = partial(SimpleNamespace, device=torch.device("cuda", 0))
        self.main, self.side = (
            stream(name=name, wait_stream=lambda other, name=name: self.log.append(f"{name} waits for {other.name}"))
            for name in ("main", "side")
        )
        self.current = self.main
        for name, value in {
            "graph_pool_handle": lambda: (0, 1),
            "current_stream": lambda device: self.current,
            "stream": self.inside,
            "synchronize": lambda: self.log.append("synchronize"),
            "empty_cache": lambda: self.log.append("empty"),
            "get_sync_debug_mode": lambda: self.mode,
            "set_sync_debug_mode": partial(setattr, self, "mode"),
            "CUDAGraph": partial(Graph, self),
        }.items():
            change.setattr(torch.cuda, name, value)
        change.setattr(capture, "_side_stream", lambda device, purpose: self.side)
        change.setattr(torch._C, "_cuda_endAllocateToPool", self.end_allocate)

    @contextmanager
    def inside(self, stream: Any) -> Iterator[None]:
        """Make a stream the current one."""
        before, self.current = self.current, stream
        self.log.append(f"on {stream.name}")
        try:
            yield
        finally:
            self.current = before
            self.log.append(f"on {before.name}")

    def wait(self) -> None:
        """Do what waits for the device."""
        if self.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        self.refuse(RuntimeError("operation not permitted when stream is capturing\nCompile with TORCH_USE_CUDA_DSA"))

    def refuse(self, error: Exception) -> None:
        """Fail if it is capturing, and end the capture thereby."""
        if self.capturing:
            self.invalid = True
            raise error

    def end_allocate(self, device: int, pool: Any) -> None:
        """What the allocator is told."""
        assert (device, pool) == (0, (0, 1))
        self.log.append("allocator: end")

    def untouched(self) -> bool:
        """Whether everything is as it was before."""
        return self.current is self.main and not self.capturing and self.mode == 1


class Graph:
    """A graph of :class:`FakeCuda`."""

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda
        self.run: Callable[[], None] = lambda: None

    def capture_begin(self, *args: Any, **kwargs: Any) -> None:
        """Begin to capture on the current stream."""
        asked = SIGNATURE.bind(self, *args, **kwargs).arguments
        assert (asked["pool"], asked["capture_error_mode"]) == ((0, 1), "thread_local")
        assert self.cuda.current is self.cuda.side
        self.cuda.log.append("begin")
        if self.cuda.fails is not None and self.cuda.at_once:
            raise self.cuda.fails
        self.cuda.capturing, self.cuda.invalid = True, False

    def capture_end(self) -> None:
        """End it."""
        assert self.cuda.current is self.cuda.side
        began, self.cuda.capturing = self.cuda.capturing, False
        self.cuda.log.append("end")
        if self.cuda.invalid or not began:
            raise RuntimeError("operation failed due to a previous error during capture")
        if self.cuda.fails is not None:
            raise self.cuda.fails

    def replay(self) -> None:
        """Run it."""
        self.cuda.log.append("replay")


SIGNATURE = inspect.signature(torch.cuda.CUDAGraph.capture_begin)
