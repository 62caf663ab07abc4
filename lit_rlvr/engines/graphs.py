"""Captured graphs: one launch in place of hundreds, which take longer than what they compute.

A graph is the same kernels on the same memory. One that serves a number of rows also serves fewer: what is left behind
in the others is computed along, and nobody reads the results.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

from lit_rlvr.engines.capture import Recorder, Replay
from lit_rlvr.segments import NAME

SPARE = 256
"""Columns that a cache's storage grows by at the least: every growth means new graphs."""
PATIENCE = 8
"""Times that a larger graph is used for fewer rows, before one of their own is captured."""


class RowGraphs:
    """A function of the first rows of some tensors, captured for a few numbers of rows.

    It is given anew each time: whoever owns it owns its graphs, and everything is freed when the owner is forgotten.

    Args:
        most: Most rows.
        recorder: Makes a recorder.
    """

    def __init__(self, most: int, recorder: Callable[[], Recorder]) -> None:
        self.most, self.make = most, recorder
        self.captures = 0
        self.forget()

    def forget(self) -> None:
        """Begin anew, because memory that was captured has been replaced."""
        self.replays: dict[int, Replay] = {}
        """By number of rows."""
        self.wanted: Counter[int] = Counter()
        """Times that each number of rows would have been the right one."""
        self.recorder = self.make()  # CUDA takes no more graphs into a pool that has lost all of its own

    def __call__(self, run: Callable[[int], None], rows: int) -> None:
        """Run the smallest graph for so many rows, or a captured one that is larger while they are new.

        Args:
            run: The function, of the number of rows. Whatever is in them, it neither fails nor does harm.
            rows: How many are in use.

        Raises:
            CaptureError: When it cannot be captured; what was captured before is to be given up.
        """
        size = bucket(rows, self.most)
        self.wanted[size] += 1
        larger = [captured for captured in self.replays if captured >= size]
        if size not in self.replays and (not larger or self.wanted[size] > PATIENCE):
            self.replays[size] = self.recorder.record(partial(run, size))
            self.captures += 1
            larger.append(size)
        self.replays[min(larger)]()


def bucket(rows: int, slots: int) -> int:
    """The rows of a graph: a power of two or three quarters of one, at most ``slots``.

    >>> [bucket(rows, 11) for rows in range(1, 12)]
    [1, 2, 3, 4, 6, 6, 8, 8, 11, 11, 11]
    """
    power: int = 1 << (rows - 1).bit_length()
    return min(slots, power * 3 // 4 if rows <= power * 3 // 4 else power)


def why_not(policy: Any, windows: list[int | None] | None) -> str | None:
    """Why the policy's decoding steps cannot be captured, as half a sentence; None: they can."""
    hf, sharded = policy.hf, (FSDPModule, FullyShardedDataParallel)
    config = hf.config.get_text_config()
    attention, rope = config._attn_implementation, _rope_types(getattr(config, "rope_parameters", None))
    reasons = {
        f"the policy is on {policy.device}, which has no CUDA graphs": policy.device.type != "cuda",
        "its weights are spread over devices": any(isinstance(module, sharded) for module in policy.modules()),
        "its layers keep more than keys and values": windows is None,
        "its layers attend within a sliding window": windows is not None and any(windows),
        f"its attention is {attention}, not sdpa or eager": attention not in ("sdpa", "eager", NAME),
        "its rotary embedding depends on the longest row": bool({"dynamic", "longrope"} & rope),
        f"what {type(hf).__name__} computes depends on values": not hf._can_compile_fullgraph,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _rope_types(parameters: Any) -> set[str]:
    """Kinds of rotary embedding, which some models have by the kind of their layers."""
    if not isinstance(parameters, dict):
        return set()
    return {str(parameters.get("rope_type"))}.union(*map(_rope_types, parameters.values()))
