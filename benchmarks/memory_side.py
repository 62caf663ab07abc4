"""The peak of what torch holds in a few steps, beside what ``lit-rlvr explain`` would say of them."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.models import configuration
from benchmarks.ours import fit, module_of
from benchmarks.settings import Settings
from lit_rlvr.explain_memory import memory_of
from lit_rlvr.facts import Cluster


def estimated(settings: Settings) -> Any:
    """The estimate of ``lit-rlvr explain``."""
    width = settings.size.prompt_tokens + settings.size.new_tokens
    facts: Any = SimpleNamespace(config=configuration(settings.size), critic=None, width=lambda module: width)
    return memory_of(module_of(settings), Cluster(1, False), facts, {"accelerator": settings.device})


def largest(record: profile) -> int:
    """The most bytes that were held at a time, from the profiler's record of what came and went."""
    assert record.profiler is not None
    results: Any = record.profiler.kineto_results
    events = results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    now = peak = 0
    for _, change in changes:
        now += change
        peak = max(peak, now)
    return peak


def measured(settings: Settings, steps: int = 2) -> int:
    """Peak bytes of loading the model and of ``steps`` steps; the second begins with the optimizer's state."""
    if settings.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        fit(settings, module_of(settings), [], steps)
        return torch.cuda.max_memory_allocated()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        fit(settings, module_of(settings), [], steps)
    return largest(record)


def main(settings: Settings) -> None:
    """Print estimate and measurement in bytes."""
    pl.seed_everything(0, verbose=False)
    memory = estimated(settings)
    expected = memory.training if settings.work == "train" else memory.peak
    print(json.dumps({"estimated": expected, "measured": measured(settings)}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Settings.read(sys.argv[1]))
