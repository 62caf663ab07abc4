"""The least that a step could cost: its operations at the machine's measured ceilings."""

from __future__ import annotations

import math
from dataclasses import dataclass

from benchmarks.ceilings import Ceilings
from benchmarks.models import Size
from benchmarks.report import emit
from benchmarks.settings import Settings


@dataclass(frozen=True)
class Floor:
    """A kind of work in a step.

    Args:
        part: ``rollout`` or ``train``.
        name: Which.
        operations: Additions and multiplications.
        seconds: At the fastest measured rate.
        reachable: At the rate of products of its own shapes.
    """

    part: str
    name: str
    operations: float
    seconds: float
    reachable: float

    @property
    def parts(self) -> tuple[str, str]:
        """What its cost counts towards."""
        return ("step", self.part)


def floors(settings: Settings, ceilings: Ceilings, shared: bool) -> list[Floor]:
    """Every kind of work of a step whose responses are all of the longest length.

    Rollouts read each prompt once. Padding, samplers, norms, activations and whatever is not a matrix product count
    nothing; AdamW counts the bytes that it must move.

    Args:
        settings: Model, work and share of tokens that learn.
        ceilings: Of the machine.
        shared: Whether training, too, computes a prompt once for all of its responses; otherwise once for each.
    """
    size, rates = settings.size, ceilings.products
    learning = math.ceil(settings.rho * size.rows * size.new_tokens)
    body_rate = 3 / (2 / rates["body"] + 1 / rates["body, weight gradient"])
    head_rate = 3 / (2 / rates["head"] + 1 / rates["head, weight gradient"])
    work = [
        ("rollout", "prompts", 2.0 * size.body * size.prompts * size.prompt_tokens, rates["body"]),
        (
            "rollout",
            "body",
            2.0 * size.body * size.rows * (size.new_tokens - 1),
            rates["body, one token per row"],
        ),
        ("rollout", "attention", 4.0 * attended(size, shared=True), ceilings.best),
        ("rollout", "head", 2.0 * size.head * size.rows * size.new_tokens, rates["head, one token per row"]),
        ("train", "body", 6.0 * size.body * trained(size, shared), body_rate),
        ("train", "attention", 12.0 * attended(size, shared), ceilings.best),
        ("train", "head", 6.0 * size.head * learning, head_rate),
    ]
    each = [Floor(part, name, ops, ops / ceilings.best, ops / rate) for part, name, ops, rate in work]
    moved = 7.0 * (4 if settings.device == "cpu" else 2) * (size.body + size.head) / ceilings.bandwidth
    return [*each, Floor("train", "AdamW", 0.0, moved, moved)]


def trained(size: Size, shared: bool) -> int:
    """Tokens that go through the layers in training; the last of a response predicts nothing."""
    prompts = size.prompts if shared else size.rows
    return prompts * size.prompt_tokens + size.rows * (size.new_tokens - 1)


def attended(size: Size, shared: bool) -> float:
    """Pairs of tokens of which one attends to the other, times width of the heads, over all layers."""
    prompts = size.prompts if shared else size.rows
    own = prompts * size.prompt_tokens**2 / 2
    new = size.rows * size.new_tokens * (size.prompt_tokens + size.new_tokens / 2)
    return size.layers * size.heads * size.head_size * (own + new)


def main(name: str, settings: Settings, ceilings: Ceilings) -> None:
    """Print ceilings, and what follows for each kind of work."""
    for product, rate in ceilings.products.items():
        emit("floors", "ceiling", settings.device, size=name, of=product, gigaflop_per_second=rate / 1e9)
    emit("floors", "ceiling", settings.device, size=name, of="copy", gigabyte_per_second=ceilings.bandwidth / 1e9)
    for shared in (False, True):
        for f in floors(settings, ceilings, shared):
            if shared and f.part == "rollout":
                continue  # the same as before
            emit(
                "floors", "work", settings.device, size=name, rho=settings.rho, prompts_shared=shared, part=f.part,
                of=f.name, gigaflop=f.operations / 1e9, floor=f.seconds, at_own_shapes=f.reachable,
            )  # fmt: skip
