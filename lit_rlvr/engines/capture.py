"""Recording a function's kernels once, and running them again without the Python around them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Protocol

import torch

Replay = Callable[[], None]
"""Runs what was recorded: the same kernels on the same memory."""


class Recorder(Protocol):
    """Records functions that read and write tensors which stay where they are.

    What a function makes on its way may be overwritten by any other replay, so it leaves its result in a tensor that
    was there before. It waits for nothing, and what it does depends on the shapes of tensors alone.
    """

    def record(self, run: Callable[[], None]) -> Replay:
        """Run it once, for what happens only the first time, and record it."""
        ...


class CudaRecorder:
    """CUDA graphs that share memory, on one side stream.

    Args:
        device: A CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.pool: Any = torch.cuda.graph_pool_handle()
        self.stream = _side_stream(device)

    def record(self, run: Callable[[], None]) -> Replay:
        """See :class:`Recorder`.

        Raises:
            RuntimeError: When CUDA cannot capture it.
        """
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            run()
        torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads, such as a loader's or NCCL's, may go on using the device.
            with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"):
                run()
        except RuntimeError as error:
            raise RuntimeError(
                "a decoding step could not be captured as a CUDA graph; model.engine.graphs: false decodes without"
            ) from error
        return graph.replay


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for the life of the process: every stream that multiplies matrices has workspace of its own."""
    return torch.cuda.Stream(device)
