"""How the C library treats freed memory on a CPU: it keeps it, for the next tensor of the kind.

By default glibc gives every large block back to the system as soon as it is freed. The system clears each page again
when the next micro-batch touches it, which costs a training step some percent of its time.
"""

from __future__ import annotations

import ctypes
import platform

TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3
"""Names of glibc's options, from malloc.h."""

LARGEST = 2**31 - 1
"""Bytes of the largest block that is kept: what fits into the options' int."""

AT_A_TIME = 64 * 2**20
"""Bytes by which the heap grows at the least."""


def keep_freed_memory() -> bool:
    """Let the process keep what it frees, so that it stays at the size of its peak. Returns whether it can be done.

    glibc has the options for it; other C libraries are left as they are.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    options = {MMAP_THRESHOLD: LARGEST, TRIM_THRESHOLD: LARGEST, TOP_PAD: AT_A_TIME}
    return all(mallopt(option, value) for option, value in options.items())
