"""How long a phase would take on machines that are not here: arithmetic on stated ceilings.

A rollout is bound by reading weights and cache from memory, scoring and training by multiplications or by gathering
weights over the network, and handing weights to the engine by the network. Every number that goes in is printed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

BF16 = 2
"""Bytes of a number: weights and cache of rollouts, and weights as they are gathered."""
USED = {"multiplications": 0.4, "memory": 0.6, "network": 0.7, "cache": 0.9}
"""Share of each ceiling that is reached: assumptions. For ``cache``: of the memory that weights leave."""


@dataclass(frozen=True)
class Device:
    """Ceilings of one device, from its maker's data sheet.

    Args:
        flops: Dense bfloat16 operations per second.
        bandwidth: Bytes per second of its memory.
        memory: Bytes.
        link: Bytes per second to devices of the same node, in one direction.
        network: Bytes per second to other nodes, one adapter per device.
    """

    flops: float
    bandwidth: float
    memory: float
    link: float
    network: float


DEVICES = {
    "A100": Device(312e12, 2.04e12, 80e9, 300e9, 25e9),
    "H100": Device(989e12, 3.35e12, 80e9, 450e9, 50e9),
    "H200": Device(989e12, 4.8e12, 141e9, 450e9, 50e9),
    "B200": Device(2250e12, 8.0e12, 180e9, 900e9, 50e9),
}


@dataclass(frozen=True)
class Machines:
    """Nodes of devices of one kind.

    Args:
        nodes: Nodes.
        each: Devices per node.
        kind: A name in :data:`DEVICES`, or any with ``ceilings``.
        ceilings: Those of each device; null: what :data:`DEVICES` says of ``kind``.

    Raises:
        ValueError: For an unknown kind, or none of something.
    """

    nodes: int
    each: int
    kind: str
    ceilings: Device | None = None

    def __post_init__(self) -> None:
        if self.kind not in DEVICES and self.ceilings is None:
            raise ValueError(f"there are no ceilings for {self.kind!r}; known are {', '.join(DEVICES)}")
        if self.nodes < 1 or self.each < 1:
            raise ValueError(f"a cluster has at least one node and one device, got {self.nodes}x{self.each}")

    @classmethod
    def of(cls, text: str) -> Machines:
        """Read ``NODESxDEVICESxKIND``.

        Raises:
            ValueError: When the text is anything else.

        >>> Machines.of("8x8xH100").devices
        64
        """
        found = re.fullmatch(r"(\d+)x(\d+)x(\w+)", text)
        if found is None:
            raise ValueError(f"cluster must be NODESxDEVICESxKIND, as in 8x8xH100; got {text!r}")
        return cls(int(found[1]), int(found[2]), found[3])

    @property
    def devices(self) -> int:
        """All devices."""
        return self.nodes * self.each

    @property
    def device(self) -> Device:
        """The ceilings of each."""
        return self.ceilings or DEVICES[self.kind]

    @property
    def narrowest(self) -> float:
        """Bytes per second of the slowest way between two devices."""
        return self.device.link if self.nodes == 1 else self.device.network


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


def stages(work: Work, machines: Machines) -> list[Stage]:
    """The parts of a phase, in order.

    Raises:
        ValueError: When a response does not fit on the devices of one node.
    """
    return [rollout(work, machines), scoring(work, machines), training(work, machines), sync(work, machines)]


def rollout(work: Work, machines: Machines) -> Stage:
    """Reading each prompt once, and decoding: each replica of the weights, on the fewest devices that hold it, serves
    as many rows as fit.
    """
    device, whole, row = machines.device, work.parameters * work.size, work.cached * (work.prompt + work.response)
    for width in (n for n in range(1, machines.each + 1) if machines.each % n == 0):
        free = USED["cache"] * (width * device.memory - whole)
        if free >= row and width * device.memory >= 2 * whole:
            break
    else:
        raise ValueError(
            f"{machines.each} x {machines.kind} hold the weights ({whole / 1e9:.0f} GB) and one response "
            f"({row / 1e9:.0f} GB) with nothing to spare; use a larger node"
        )
    per_replica = -(-work.rows * width // machines.devices)
    together = min(per_replica, int(free // row))
    waves = -(-per_replica // together)
    mean_row = work.cached * (work.prompt + work.response / 2)
    read = (whole + together * mean_row) / (width * device.bandwidth * USED["memory"])
    multiplied = 2.0 * (work.body + work.head) * together / (width * device.flops * USED["multiplications"])
    prompts = work.prompts * work.layers_forward(work.prompt) / (machines.devices * _multiplied(machines))
    seconds = prompts + work.response * waves * max(read, multiplied)
    bound = "memory bandwidth" if read >= multiplied else "multiplications"
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


def estimate_lines(work: Work, machines: Machines, training_memory: float) -> list[str]:
    """Seconds and memory of each part of a phase, their sum, and everything that was assumed.

    Args:
        work: What the phase has to do.
        machines: Where.
        training_memory: Bytes that an optimiser step takes on one device.
    """
    parts = stages(work, machines)
    lines = []
    for part in parts:
        size = training_memory if part.name == "training" else part.memory
        held = "" if size is None else f"{size / 2**30:.0f} GiB of a device, "
        lines.append(f"{part.name:<9} {part.seconds:>8,.0f} s  {held}{part.how}; bound by {part.bound}")
    total = sum(part.seconds for part in parts)
    return [*lines, f"{'a phase':<9} {total:>8,.0f} s", *assumptions(work, machines)]


def assumptions(work: Work, machines: Machines) -> list[str]:
    """Everything that went in beside the configuration."""
    d, shares = machines.device, ", ".join(f"{share:.0%} of {name}" for name, share in USED.items())
    return [
        f"{machines.kind}: {d.flops / 1e12:.0f} TFLOP/s bfloat16, {d.bandwidth / 1e12:.2f} TB/s and "
        f"{d.memory / 1e9:.0f} GB of memory, {d.link / 1e9:.0f} GB/s within a node, {d.network / 1e9:.0f} GB/s between",
        f"reached: {shares}; assumed, not measured",
        f"every response takes {work.response} tokens, the limit; shorter ones take less, uneven ones idle",
        "rollouts by a serving engine on the same devices, which reads each prompt once for all of its responses; its "
        "log-probabilities are scored again before learning",
        "one round of sampling; rollouts, scoring and training one after the other; the verifier takes no time",
        "every response token goes through the head, chosen or not; moving weights overlaps with multiplications",
    ]


def _multiplied(machines: Machines) -> float:
    """Operations per second that a device reaches."""
    return machines.device.flops * USED["multiplications"]
