"""The reward protocol: one aspect of a response as a number."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lit_rlvr.tasks.base import Prompt


@dataclass(frozen=True)
class Judgement:
    """What a reward says of one response.

    Args:
        reward: The reward, before its weight.
        answer: The answer found in the response, for majority voting; ``None`` when there is none.
    """

    reward: float
    answer: str | None = None


class Reward(ABC):
    """Says what a response is worth. Make yours a dataclass: its fields are its options in YAML."""

    weight: float = 1.0
    """Its factor in the sum of all rewards."""

    isolated: bool = True
    """Whether it runs in a separate process with a time limit. Turn off only for trusted, instant code."""

    needs_answer: bool = False
    """Whether it compares with the reference answer, so that every problem must have one."""

    @abstractmethod
    def __call__(self, prompt: Prompt, response: str) -> Judgement:
        """Judge a response (without special tokens). May raise: the failure is counted and named."""


def reference(prompt: Prompt) -> str:
    """The prompt's reference answer.

    Raises:
        ValueError: When it has none.
    """
    if prompt.answer is None:
        raise ValueError(f"problem {prompt.meta.get('source', prompt.index)} has no reference answer to compare with")
    return prompt.answer
