"""The least that a step could cost: its operations at the machine's measured ceilings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from benchmarks.ceilings import Ceilings
from benchmarks.entering import Entering, chosen, every_token, least, sampled
from benchmarks.models import Size
from benchmarks.report import emit
from benchmarks.settings import Settings

Counted = Literal["least", "all tokens"]
COUNTED: tuple[Counted, ...] = ("least", "all tokens")
"""What of training is counted: what nothing can do without, or every token through every layer, prompts once per
response. The second is what an implementation works on that leaves nothing out but the head of tokens that do not
learn; rollouts are the same in both."""

BYTES = {"cpu": 4, "cuda": 2}
"""Of a weight."""


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


def floors(settings: Settings, ceilings: Ceilings, counted: Counted) -> list[Floor]:
    """Every kind of work of a step whose responses are all of the longest length.

    Padding, samplers, norms, activations and whatever is not a matrix product count nothing; AdamW counts the bytes
    that it must move, and decoding on a GPU those that it must read, where they take longer than its products.

    Args:
        settings: Model, work and share of tokens that learn, drawn at random.
        ceilings: Of the machine.
        counted: What of training counts.
    """
    size = settings.size
    learning = ("body", "body, weight gradient"), ("head", "head, weight gradient")
    body, head = (3 / (2 / ceilings.rate(forward) + 1 / ceilings.rate(weight)) for forward, weight in learning)
    rates = {
        ("rollout", "prompts"): ceilings.rate("body"),
        ("rollout", "body"): ceilings.rate("body, one token per row"),
        ("rollout", "head"): ceilings.rate("head, one token per row"),
        ("train", "body"): body,
        ("train", "last layer"): body,
        ("train", "head"): head,
    }
    each = [
        Floor(part, name, ops, ops / ceilings.best, ops / rates.get((part, name), ceilings.best))
        for part, name, ops in operations(size, settings.rho, counted)
    ]
    moved = 7.0 * BYTES[settings.device] * (size.body + size.head) / ceilings.bandwidth
    each.append(Floor("train", "AdamW", 0.0, moved, moved))
    return [*each, waiting(size, ceilings, each)] if settings.device == "cuda" else each


def waiting(size: Size, ceilings: Ceilings, each: list[Floor]) -> Floor:
    """What reading weights and cache takes beyond the products of decoding, of a model that no cache of a GPU holds."""
    products = [f for f in each if f.part == "rollout" and f.name != "prompts"]
    seconds = BYTES["cuda"] * read_to_decode(size) / ceilings.bandwidth
    beyond = max(0.0, seconds - sum(f.seconds for f in products))
    at_own = max(0.0, seconds - sum(f.reachable for f in products))
    return Floor("rollout", "memory, beyond products", 0.0, beyond, at_own)


def read_to_decode(size: Size) -> float:
    """Numbers that decoding reads, with all rows at a time: weights, keys and values, those of a prompt once for all of
    its responses.
    """
    steps = size.new_tokens - 1
    tokens = size.prompts * size.prompt_tokens * steps + size.rows * steps * size.new_tokens / 2
    return (size.body + size.head) * steps + 2.0 * size.layers * size.key_heads * size.head_size * tokens


def operations(size: Size, rho: float, counted: Counted) -> Iterator[tuple[str, str, float]]:
    """Part, name and operations of every kind of work that multiplies."""
    rows = sampled(size)
    decoded = size.rows * (size.new_tokens - 1)
    yield "rollout", "prompts", 2.0 * (through_layers(size, rows) - size.body * decoded)
    yield "rollout", "body", 2.0 * size.body * decoded
    yield "rollout", "attention", 4.0 * attended(size, rows)
    yield "rollout", "head", 2.0 * size.head * size.rows * size.new_tokens
    entering = least(size, rho) if counted == "least" else every_token(size)
    last = size.late * entering.read
    yield "train", "body", 6.0 * (through_layers(size, entering) - last)
    yield "train", "last layer", 6.0 * last
    yield "train", "attention", 12.0 * attended(size, entering)
    yield "train", "head", 6.0 * size.head * chosen(size, rho)


def needed_to_train(size: Size, rho: float) -> float:
    """All operations that training cannot do without."""
    return sum(ops for part, _, ops in operations(size, rho, "least") if part == "train")


def through_layers(size: Size, entering: Entering) -> float:
    """Weights times tokens, over all layers; of the last, a token that is not read has only keys and values."""
    return (size.body - size.late) * entering.tokens + size.late * entering.read


def attended(size: Size, entering: Entering) -> float:
    """Pairs of tokens of which one attends to the other, times width of the heads, over all layers."""
    return size.heads * size.head_size * ((size.layers - 1) * entering.pairs + entering.read_pairs)


def main(name: str, settings: Settings, ceilings: Ceilings) -> None:
    """Print ceilings, and what follows for each kind of work."""
    for product, rate in ceilings.products.items():
        emit("floors", "ceiling", settings.device, size=name, of=product, gigaflop_per_second=rate / 1e9)
    emit("floors", "ceiling", settings.device, size=name, of="copy", gigabyte_per_second=ceilings.bandwidth / 1e9)
    for counted in COUNTED:
        for f in floors(settings, ceilings, counted):
            if f.part == "rollout" and counted != COUNTED[0]:
                continue  # the same as before
            emit(
                "floors", "work", settings.device, size=name, rho=settings.rho, counted=counted, part=f.part,
                of=f.name, gigaflop=f.operations / 1e9, floor=f.seconds, at_own_shapes=f.reachable,
            )  # fmt: skip
