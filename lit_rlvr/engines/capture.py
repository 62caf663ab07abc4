"""Recording a function's kernels once, and running them again without the Python around them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any, Protocol

import torch

Replay = Callable[[], None]
"""Runs what was recorded: the same kernels on the same memory."""


class CaptureError(RuntimeError):
    """Why a function was not recorded; it can still be run as it is."""


class Recorder(Protocol):
    """Records functions that read and write tensors which stay where they are.

    What a function makes on its way may be overwritten by any other replay, so it leaves its result in a tensor that
    was there before. It waits for nothing, and what it does depends on the shapes of tensors alone.
    """

    def record(self, run: Callable[[], None]) -> Replay:
        """Run it once, for what happens only the first time, and record it; it is not kept.

        Raises:
            CaptureError: When it cannot be recorded, and there is another way.
        """
        ...


class CudaRecorder:
    """CUDA graphs that share memory, on a side stream.

    What is recorded for one purpose has to be forgotten together: with one graph, some versions of torch give up the
    workspace in which all graphs of its stream multiply matrices.

    Args:
        device: A CUDA device.
        required: Whether there is no other way.
        purpose: What is recorded, in the plural. Each purpose has a stream.
    """

    def __init__(self, device: torch.device, required: bool, purpose: str) -> None:
        self.pool: Any = torch.cuda.graph_pool_handle()
        self.stream = _side_stream(device, purpose)
        self.required, self.purpose = required, purpose
        self.empty = True

    def record(self, run: Callable[[], None]) -> Replay:
        """See :class:`Recorder`. Whatever happens, the current stream is the same afterwards.

        Raises:
            torch.cuda.OutOfMemoryError: When memory is not enough.
            CaptureError: When CUDA cannot capture it.
            RuntimeError: The same, where that is ``required``.
        """
        main = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(main)
        try:
            with torch.cuda.stream(self.stream):
                with _waiting_fails():
                    run()
                return self._capture(run)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
            if self.required:
                problem = f"{self.purpose} cannot be captured ({reason})"
                raise RuntimeError(f"engine.graphs: true is not possible: {problem}; leave it null") from error
            raise CaptureError(f"{self.purpose} cannot be captured as CUDA graphs ({reason})") from error
        finally:
            main.wait_stream(self.stream)

    def _capture(self, run: Callable[[], None]) -> Replay:
        """What ``torch.cuda.graph`` does, but that gives back all cached memory every time, and can hide an error."""
        if self.empty:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # while it captures, the allocator takes nothing of what it keeps for others
            self.empty = False
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads, such as a loader's or NCCL's, may go on using the device.
            graph.capture_begin(self.pool, capture_error_mode="thread_local")
            run()
        except BaseException:
            with suppress(RuntimeError):
                self._end(graph)
            raise
        self._end(graph)
        return graph.replay

    def _end(self, graph: torch.cuda.CUDAGraph) -> None:
        try:
            graph.capture_end()
        except RuntimeError:
            # Some versions of torch leave the allocator waiting for the end, which then gives nothing back any more.
            with suppress(RuntimeError):
                end: Any = torch._C._cuda_endAllocateToPool
                end(self.stream.device.index, self.pool)
            raise


@cache
def _side_stream(device: torch.device, purpose: str) -> torch.cuda.Stream:
    """One for the life of the process: every stream that multiplies matrices has workspace of its own."""
    return torch.cuda.Stream(device)


@contextmanager
def _waiting_fails() -> Iterator[None]:
    """Inside, what waits for the device raises RuntimeError: a capture that fails for it leaves torch in disorder."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Synchronization debug mode")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
