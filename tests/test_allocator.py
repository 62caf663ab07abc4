"""Freed memory stays with the process, where the C library can be told so."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from lit_rlvr.allocator import keep_freed_memory

FAULTS = """
import resource, sys
from lit_rlvr.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def touch():
    block = bytearray(40 * 2**20)  # bytearray clears it, so every page is touched
touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(way: str) -> int:
    """Page faults of ten blocks of 40 MiB, one after the other, in a process of its own."""
    run = [sys.executable, "-c", FAULTS, way]
    return int(subprocess.run(run, capture_output=True, text=True, check=True, timeout=60).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's options")
def test_blocks_are_faulted_in_once() -> None:
    """A block of 40 MiB has at least 20 pages, of 2 MiB, and is not cleared by the system again and again."""
    assert faults("keep") < 20
    assert faults("leave") >= 10 * 20


def test_other_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not keep_freed_memory()
