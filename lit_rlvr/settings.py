"""Small settings of a run: batch sizes and evaluations."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from lit_rlvr.engines import Sampling


@dataclass(frozen=True)
class Batch:
    """Sizes of a rollout phase and of its optimiser steps.

    Args:
        prompts: Prompts per rollout phase, over all ranks.
        responses: Responses sampled per prompt: the group size.
        minibatch_prompts: Prompts per optimiser step; null: all of the phase's.
        epochs: Passes over a phase's rollouts.
        micro_tokens: Tokens per forward and backward pass on one device, padding included. Changes memory and speed,
            never the gradient.
        micro_rows: Responses per forward and backward pass instead, for callbacks that act on micro-batches, whose
            choices depend on it; null: by ``micro_tokens``.
        layout: ``padded``: rows beside each other, filled up to the longest. ``packed``: rows one behind the other,
            each attended to on its own. ``shared``: packed, and responses to one prompt share its place, so that it is
            computed once; those of more than some 2,000 tokens only in bfloat16 and float16 on a GPU, where attention
            needs no mask for it. Changes speed and memory, never the gradient. null: ``shared`` for models of the kinds
            gemma, gemma3_text, gpt2, granite, llama, mistral, phi3, qwen2, qwen3 and smollm3, ``padded`` for others; a
            model whose attention does not allow what is asked for is refused.

    Raises:
        ValueError: When a size is below 1, or mini-batches do not divide the phase.
    """

    prompts: int = 32
    responses: int = 8
    minibatch_prompts: int | None = None
    epochs: int = 1
    micro_tokens: int = 16_384
    micro_rows: int | None = None
    layout: Literal["padded", "packed", "shared"] | None = None

    def __post_init__(self) -> None:
        for name in ("prompts", "responses", "epochs", "micro_tokens", "micro_rows"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"batch.{name} must be at least 1, got {getattr(self, name)}")
        if self.minibatch_prompts is not None and (self.minibatch_prompts < 1 or self.prompts % self.minibatch_prompts):
            raise ValueError(
                f"batch.prompts={self.prompts} must be a multiple of batch.minibatch_prompts={self.minibatch_prompts}"
            )

    @property
    def minibatches(self) -> int:
        """Mini-batches in one pass over a phase."""
        return self.prompts // (self.minibatch_prompts or self.prompts)

    @property
    def steps_per_phase(self) -> int:
        """Optimiser steps per rollout phase."""
        return self.minibatches * self.epochs


@dataclass(frozen=True)
class Evaluation:
    """One way of evaluating on held-out prompts.

    Args:
        temperature: Divides the logits; 0 is greedy.
        max_new_tokens: Longest response, in tokens; null: as in training, ``model.sampling.max_new_tokens``.
        top_p: Keep the smallest set of tokens whose probability reaches this; 1 keeps all.
        top_k: Keep this many most likely tokens; 0 keeps all.
        stop: Strings that end a response.
        samples: Responses per prompt.
        k: Report pass@k for these; null: for ``samples``, where there are several. pass@1 is the same as mean@n.

    Raises:
        ValueError: When several greedy samples are asked for, which would all be the same, or a k is out of range.
    """

    temperature: float = 1.0
    max_new_tokens: int | None = None
    top_p: float = 1.0
    top_k: int = 0
    stop: list[str] = field(default_factory=list)
    samples: int = 1
    k: list[int] | None = field(default=None)

    def __post_init__(self) -> None:
        self.sampling(limit=1)  # refuses numbers that are out of range
        if self.samples < 1:
            raise ValueError(f"evaluation samples must be at least 1, got {self.samples}")
        if self.temperature == 0 and self.samples > 1:
            raise ValueError("greedy evaluation (temperature 0) gives the same response every time; use samples: 1")
        if bad := [x for x in self.pass_k if not 1 <= x <= self.samples]:
            raise ValueError(f"pass@{bad[0]} needs 1 <= k <= samples, and there are {self.samples} samples per prompt")

    def sampling(self, limit: int) -> Sampling:
        """How responses are drawn; ``limit`` is the longest where ``max_new_tokens`` is null."""
        length = limit if self.max_new_tokens is None else self.max_new_tokens
        return Sampling(self.temperature, length, self.top_p, self.top_k, self.stop)

    @property
    def pass_k(self) -> list[int]:
        """The k of pass@k, ascending."""
        if self.k is not None:
            return sorted(set(self.k))
        return [self.samples] if self.samples > 1 else []
