"""The engine protocol and the types around it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lit_rlvr.policy import Policy
from lit_rlvr.reduce import Reduce


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn.

    Args:
        temperature: Divides the logits; 0 is greedy (evaluations only).
        max_new_tokens: Longest response, in tokens.
        top_p: Keep the smallest set of tokens whose probability reaches this; 1 keeps all. Evaluation only.
        top_k: Keep this many most likely tokens; 0 keeps all. Evaluation only.
        stop: Strings that end a response once its text contains one of them.

    Raises:
        ValueError: When a number is out of range.
    """

    temperature: float = 1.0
    max_new_tokens: int = 1024
    top_p: float = 1.0
    top_k: int = 0
    stop: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"sampling temperature must be >= 0, got {self.temperature}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be >= 0 (0 keeps all tokens), got {self.top_k}")
        if "" in self.stop:
            raise ValueError("an empty stop string would end every response at its first token")

    @property
    def truncates(self) -> bool:
        """Whether tokens are drawn from less than the full distribution."""
        return self.temperature == 0 or self.top_p < 1 or self.top_k > 0


def check_context(longest: int, sampling: Sampling, limit: int, whose: str, more: str = "") -> None:
    """Refuse prompts that leave no room for a response.

    Args:
        longest: Tokens of the longest prompt.
        sampling: Has the longest response.
        limit: Tokens that prompt and response may have together.
        whose: Limit that is, as in ``the model's``.
        more: What else can be done about it.

    Raises:
        ValueError: Saying what to lower.
    """
    if longest + sampling.max_new_tokens > limit:
        raise ValueError(
            f"a prompt of {longest} tokens and max_new_tokens={sampling.max_new_tokens} exceed {whose} context of "
            f"{limit} tokens; lower max_new_tokens or max_prompt_tokens{more}"
        )


@dataclass(frozen=True)
class Generation:
    """Responses of an engine, one row per (prompt, sample), samples of a prompt side by side.

    Args:
        ids: Response tokens, the end-of-sequence token included [B, T], padded on the right with 0.
        mask: True on response tokens [B, T].
        logprobs: Log-probability of each token under the full distribution at the sampling temperature [B, T].
        entropies: Entropy of that distribution [B, T], or None where the engine cannot tell.
        truncated: True where the length limit ended the response [B].
    """

    ids: Tensor
    mask: Tensor
    logprobs: Tensor
    entropies: Tensor | None
    truncated: Tensor

    def rows(self, index: Tensor) -> Generation:
        """The rows that ``index`` [n] names, in its order."""
        entropies = None if self.entropies is None else self.entropies[index.to(self.entropies.device)]
        ids, mask, logprobs, truncated = (
            tensor[index.to(tensor.device)] for tensor in (self.ids, self.mask, self.logprobs, self.truncated)
        )
        return Generation(ids, mask, logprobs, entropies, truncated)


class Engine(ABC):
    """Something that samples responses from the current policy.

    A run calls ``setup`` once, then ``sync`` before sampling and ``rest`` after it, and ``close`` at its end. Only
    engines with a copy of the weights have something to do there.
    """

    @abstractmethod
    def exact(self, precision: str) -> bool:
        """Whether log-probabilities equal those of the training forward to float32 tolerance.

        Args:
            precision: The Trainer's precision, as in ``32-true``.
        """

    @abstractmethod
    def generate(
        self,
        policy: Policy,
        tokenizer: Any,
        prompts: Sequence[Sequence[int]],
        uid: Tensor,
        sampling: Sampling,
        seed: int,
    ) -> Generation:
        """Sample ``len(uid) / len(prompts)`` responses to each prompt.

        Args:
            policy: The policy to sample from.
            tokenizer: Its tokenizer.
            prompts: Prompt tokens.
            uid: (phase, draw, sample) of every row [B, 3]; with ``seed`` it fixes the row's random numbers.
            sampling: Temperature, length and truncation.
            seed: The run's seed.
        """

    def setup(self) -> None:  # noqa: B027
        """Begin a run: whatever was sampled from before may have other weights now. Every rank calls it."""

    def sync(self, policy: Policy, version: int, reduce: Reduce) -> None:  # noqa: B027
        """Make sure that the next responses are drawn from the policy's current weights. Every rank calls it.

        Args:
            policy: The current policy.
            version: Optimiser steps so far; the same number in the same run means the same weights.
            reduce: Reaches the other ranks.
        """

    def rest(self, reduce: Reduce) -> None:  # noqa: B027
        """Sampling is over until the next ``sync``. Every rank calls it, once all have sampled."""

    def check_overlap(self) -> None:
        """Refuse to sample in a thread while the policy learns.

        Raises:
            ValueError: Unless :meth:`generate` reads nothing that learning changes.
        """
        raise ValueError(
            f"model.overlap needs an engine with devices of its own, and {type(self).__name__} samples with the policy "
            "that is learning; use VLLMServerEngine, as in --config configs/engine/vllm_overlap.yaml"
        )

    def cancel(self) -> None:  # noqa: B027
        """Have a :meth:`generate` that runs in another thread end soon, with an error. For engines that overlap."""

    def metrics(self, reduce: Reduce) -> dict[str, float]:
        """What to log since the last call, the same on every rank. Every rank calls it."""
        return {}

    def close(self) -> None:  # noqa: B027
        """End a run. Every rank calls it."""
