"""How long a phase would take on machines that are not here: arithmetic on stated ceilings.

A rollout is bound by reading weights and cache from memory, scoring and training by multiplications or by gathering
weights over the network, and handing weights to the engine by the network. Every number that goes in is printed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from lit_rlvr.machines import Machines

BF16 = 2
"""Bytes of a number: weights and cache of rollouts, and weights as they are gathered."""
USED = {"multiplications": 0.4, "memory": 0.6, "network": 0.7, "cache": 0.9}
"""Share of each ceiling that is reached: assumptions. For ``cache``: of the memory that is left for it."""
LONGEST_WARNING = 65_535
"""Seconds before its end at which SLURM can signal a job at the earliest."""
LAUNCHED = 5e-4
"""Seconds that the kernels of one layer take to be launched, in decoding steps that are not captured: an assumption."""


@dataclass(frozen=True)
class Sampler:
    """How an engine decodes.

    Args:
        words: What it is.
        most: Responses at a time on one device; null: as many as fit.
        each: Devices that share one copy of the weights; null: the fewest that have room for it.
        captured: Whether decoding steps are captured, so that launching kernels costs nothing.
        beside: Bytes on each device that the engine has to leave alone.
    """

    words: str = "a serving engine on the same devices"
    most: int | None = None
    each: int | None = None
    captured: bool = True
    beside: int = 0


@dataclass(frozen=True)
class Work:
    """What one rollout phase has to do.

    Args:
        parameters: Of the policy.
        body: Those that every token is multiplied with.
        head: Those that a hidden state is multiplied with for a distribution.
        layers: Its layers.
        attention: Width of all heads of a layer.
        cached: Bytes of keys and values per token.
        rows: Responses.
        prompts: Prompts that they answer.
        prompt: Tokens of a prompt.
        response: Tokens of a response.
        scorings: Forward passes over all rows, beside learning.
        learnings: Forward and backward passes over all rows.
        recomputed: Whether activations are recomputed in the backward pass.
        micro_batches: Forward and backward passes of one device in all optimiser steps of the phase.
        chosen: Share of response tokens that go through the head where they learn.
        size: Bytes of a number in weights and cache.
    """

    parameters: int
    body: int
    head: int
    layers: int
    attention: int
    cached: int
    rows: int
    prompts: int
    prompt: int
    response: int
    scorings: int
    learnings: int
    recomputed: bool
    micro_batches: int
    chosen: float = 1.0
    size: int = BF16

    @classmethod
    def of(cls, config: Any, parameters: int, *, size: int = BF16, **numbers: Any) -> Work:
        """The work on a model with a Hugging Face configuration."""
        text = config.get_text_config()
        heads = text.num_attention_heads
        width = getattr(text, "head_dim", None) or text.hidden_size // heads
        stored = getattr(text, "num_key_value_heads", None) or heads
        cached = 2 * text.num_hidden_layers * stored * width * size
        head = text.vocab_size * text.hidden_size
        body = parameters - (1 if config.tie_word_embeddings else 2) * head  # an embedding is looked up
        return cls(parameters, body, head, text.num_hidden_layers, heads * width, cached, size=size, **numbers)

    def layers_forward(self, tokens: int) -> float:
        """Operations of one row of ``tokens`` in the layers: two per weight and token, and attention to all before."""
        return 2.0 * self.body * tokens + 2.0 * self.layers * self.attention * tokens**2

    @property
    def forward(self) -> float:
        """Operations of scoring one row: its response tokens go through the head, its prompt does not."""
        return self.layers_forward(self.prompt + self.response) + 2.0 * self.head * self.response

    @property
    def learning(self) -> float:
        """Operations of learning from one row: the backward pass costs two forward passes; the head recomputes none."""
        passes = 4 if self.recomputed else 3
        layers = passes * self.layers_forward(self.prompt + self.response)
        return layers + 3 * 2.0 * self.head * self.response * self.chosen


@dataclass(frozen=True)
class Stage:
    """A part of a phase.

    Args:
        name: Which.
        seconds: How long it takes.
        bound: What it waits for.
        memory: Bytes on one device; None where it is not this file's to say.
        how: How it is laid out, in words.
    """

    name: str
    seconds: float
    bound: str
    memory: float | None
    how: str


def stages(work: Work, machines: Machines, sampler: Sampler = Sampler()) -> list[Stage]:
    """The parts of a phase, in order.

    Raises:
        ValueError: When a response does not fit on the devices of one node.
    """
    return [rollout(work, machines, sampler), scoring(work, machines), training(work, machines), sync(work, machines)]


def rollout(work: Work, machines: Machines, sampler: Sampler = Sampler()) -> Stage:
    """Reading each prompt once, and decoding: each replica of the weights, on the fewest devices that hold it, serves
    as many rows as fit.

    Raises:
        ValueError: When a response does not fit.
    """
    device, whole, row = machines.device, work.parameters * work.size, work.cached * (work.prompt + work.response)
    possible = [n for n in range(1, machines.each + 1) if machines.each % n == 0]
    widths = possible if sampler.each is None else [sampler.each]
    for width in widths:
        room = width * (device.memory - sampler.beside)
        free = USED["cache"] * (room - whole)
        if free >= row and (room >= 2 * whole or sampler.each is not None):
            break
    else:
        raise ValueError(
            f"{widths[-1]} x {machines.kind} hold the weights ({whole / 1e9:.0f} GB), a response ({row / 1e9:.0f} GB) "
            f"and what training keeps ({widths[-1] * sampler.beside / 1e9:.0f} GB) with nothing to spare; use "
            + ("a larger node" if sampler.each is None else "an engine that spreads the weights over more devices")
        )
    per_replica = -(-work.rows * width // machines.devices)
    together = min(per_replica, int(free // row), sampler.most or per_replica)
    waves = -(-per_replica // together)
    mean_row = work.cached * (work.prompt + work.response / 2)
    read = (whole + together * mean_row) / (width * device.bandwidth * USED["memory"])
    multiplied = 2.0 * (work.body + work.head) * together / (width * device.flops * USED["multiplications"])
    prompts = work.prompts * work.layers_forward(work.prompt) / (machines.devices * _multiplied(machines))
    bounds = {"memory bandwidth": read, "multiplications": multiplied}
    if not sampler.captured:
        bounds["launching kernels"] = LAUNCHED * work.layers
    bound = max(bounds, key=lambda name: bounds[name])
    seconds = prompts + work.response * waves * bounds[bound]
    how = f"replicas of {width} device(s), {together} responses at a time, {waves} wave(s)"
    return Stage("rollout", seconds, bound, (whole + together * row) / width, how)


def scoring(work: Work, machines: Machines) -> Stage:
    """Forward passes for old and reference log-probabilities and values."""
    seconds = work.scorings * work.rows * work.forward / (machines.devices * _multiplied(machines))
    return Stage("scoring", seconds, "multiplications", None, f"{work.scorings} pass(es)")


def training(work: Work, machines: Machines) -> Stage:
    """Forward, backward and recomputation, against gathering weights and spreading gradients for each micro-batch."""
    computed = work.learnings * work.rows * work.learning / (machines.devices * _multiplied(machines))
    moved = 3.0 * work.size * work.parameters * work.micro_batches * (machines.devices > 1)
    moving = moved / (machines.narrowest * USED["network"])
    bound = "multiplications" if computed >= moving else "network"
    passes = (4 if work.recomputed else 3) * work.learnings
    how = f"{passes} forward passes' worth, weights moved {3 * work.micro_batches} times"
    return Stage("training", max(computed, moving), bound, None, how)


def sync(work: Work, machines: Machines) -> Stage:
    """New weights for the engine, once a phase."""
    seconds = work.size * work.parameters / (machines.narrowest * USED["network"])
    return Stage("sync", seconds, "network", None, "all weights once")


def estimate_lines(work: Work, machines: Machines, training_memory: float, sampler: Sampler = Sampler()) -> list[str]:
    """Seconds and memory of each part of a phase, their sum, and everything that was assumed.

    Args:
        work: What the phase has to do.
        machines: Where.
        training_memory: Bytes that an optimiser step takes on one device.
        sampler: The engine.
    """
    parts = stages(work, machines, sampler)
    lines = []
    for part in parts:
        size = training_memory if part.name == "training" else part.memory
        held = "" if size is None else f"{size / 2**30:.0f} GiB of a device, "
        lines.append(f"{part.name:<9} {part.seconds:>8,.0f} s  {held}{part.how}; bound by {part.bound}")
        if size is not None and size > machines.device.memory:
            lines.append(f"{'':<9} that is more than the {machines.device.memory / 2**30:.0f} GiB that a device has")
    total = sum(part.seconds for part in parts)
    return [*lines, f"{'a phase':<9} {total:>8,.0f} s", warning_line(total), *assumptions(work, machines, sampler)]


def warning_line(phase: float) -> str:
    """How long before the end of a job a run wants to be told, if a phase takes so many seconds.

    >>> warning_line(1000.0)
    'told to stop, a run ends its phase first: have the scheduler warn it 1300 s before, as by --signal=B:USR1@1300'
    """
    seconds = 100 * math.ceil(1.25 * phase / 100)
    if seconds > LONGEST_WARNING:
        return (
            f"told to stop, a run ends its phase first: SLURM warns {LONGEST_WARNING} s before at most, too late here"
        )
    return (
        f"told to stop, a run ends its phase first: have the scheduler warn it {seconds} s before, as by "
        f"--signal=B:USR1@{seconds}"
    )


def assumptions(work: Work, machines: Machines, sampler: Sampler = Sampler()) -> list[str]:
    """Everything that went in beside the configuration."""
    launched = "" if sampler.captured else f"; {LAUNCHED * 1e3:g} ms to launch the kernels of a layer"
    d, shares = machines.device, ", ".join(f"{share:.0%} of {name}" for name, share in USED.items())
    return [
        f"{machines.kind}: {d.flops / 1e12:.0f} TFLOP/s bfloat16, {d.bandwidth / 1e12:.2f} TB/s and "
        f"{d.memory / 1e9:.0f} GB of memory, {d.link / 1e9:.0f} GB/s within a node, {d.network / 1e9:.0f} GB/s between",
        f"reached: {shares}{launched}; assumed, not measured",
        f"every response takes {work.response} tokens, the limit; shorter ones take less, uneven ones idle",
        f"rollouts by {sampler.words}; each prompt is read once for all of its responses",
        "one round of sampling; rollouts, scoring and training one after the other; the verifier takes no time",
        "every response token goes through the head, chosen or not; moving weights overlaps with multiplications",
    ]


def _multiplied(machines: Machines) -> float:
    """Operations per second that a device reaches."""
    return machines.device.flops * USED["multiplications"]
