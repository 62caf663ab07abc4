"""Results: one line of JSON each."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from importlib.metadata import version
from typing import Any

import torch

PACKAGES = ("torch", "transformers", "trl", "lightning")


def machine(device: str) -> dict[str, Any]:
    """Where and with what a result was measured."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "cuda": torch.version.cuda if device == "cuda" else None,
        "processor": processor(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        "command": shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]]),
    }


def processor() -> str:
    """The CPU's name."""
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def emit(benchmark: str, kind: str, device: str, **values: Any) -> None:
    """Print a result.

    Args:
        benchmark: Which.
        kind: What the line tells: the table that it belongs to.
        device: ``cpu`` or ``cuda``.
        values: The result.
    """
    line = {"benchmark": benchmark, "kind": kind, **values, **machine(device)}
    print(json.dumps({k: rounded(v) if isinstance(v, float) else v for k, v in line.items()}), flush=True)


def rounded(value: float) -> float:
    """Five significant digits.

    >>> rounded(1234.5678), rounded(0.000123456), rounded(0.0)
    (1234.6, 0.00012346, 0.0)
    """
    return float(f"{value:.5g}")
