"""Results: one line of JSON each."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import version
from typing import Any

import torch


def machine(device: str) -> dict[str, Any]:
    """Where and with what a result was measured."""
    name = torch.cuda.get_device_name() if device == "cuda" else processor()
    return {
        "device": name,
        "load": round(os.getloadavg()[0], 1),
        **{package: version(package) for package in ("torch", "transformers", "trl", "lightning")},
    }


def processor() -> str:
    """The CPU's name."""
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def emit(benchmark: str, device: str, **values: Any) -> None:
    """Print a result."""
    rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in values.items()}
    print(json.dumps({"benchmark": benchmark, **rounded, **machine(device)}), flush=True)
