"""The task protocol. Kept free of torch, so that verifier processes start quickly."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import Any, Literal

Split = Literal["train", "val", "test"]


@dataclass(frozen=True)
class Prompt:
    """One problem of a task.

    Args:
        index: Its place in the task's split; stable between runs.
        question: The problem as plain text; the data module's template turns it into the model's input.
        answer: The reference answer, or ``None`` where the verifier needs none.
        meta: Whatever else the task's verifier needs.
        benchmark: The held-out set that it belongs to, where there are several; evaluations report each apart.
    """

    index: int
    question: str
    answer: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    benchmark: str | None = None


@dataclass(frozen=True)
class Score:
    """What a verifier says of one response.

    Args:
        reward: What learning maximises.
        correct: The outcome: groups are filtered on it and evaluation reports it.
        answer: The answer found in the response, for majority voting; ``None`` when there is none.
        parts: The reward's parts by name, where it has several.
    """

    reward: float
    correct: bool
    answer: str | None = None
    parts: dict[str, float] = field(default_factory=dict)


class Task(ABC):
    """Problems and their verifier."""

    isolated: bool = True
    """Whether answers are scored in separate processes with a time limit. Turn off only for trusted, instant code."""

    reward_names: tuple[str, ...] = ()
    """The parts of a score's reward that are logged apart, as ``rollout/reward_<name>``."""

    @abstractmethod
    def prompts(self, split: Split) -> Sequence[Prompt]:
        """The problems of a split; the same at every call."""

    @abstractmethod
    def score(self, prompt: Prompt, response: str) -> Score:
        """Judge a response (without special tokens). May raise: the failure is counted and named."""

    def demonstrate(self, prompt: Prompt, rng: random.Random) -> str:
        """A response to imitate in a supervised warm start.

        Raises:
            ValueError: When the task has no demonstrations.
        """
        raise ValueError(
            f"{type(self).__name__} has no demonstrations, so it cannot be used for a warm start; --warmup=null does "
            "without"
        )

    def demonstration_facts(self) -> dict[str, Any]:
        """All that training prompts and demonstrations depend on: a warm start is repeated when it changes.

        Every field of the task, unless a task knows better, for example that its rewards play no part.

        Raises:
            ValueError: When the task is no dataclass, so that its fields are not known.
        """
        if not is_dataclass(self):
            raise ValueError(
                f"{type(self).__name__} must be a dataclass to be used for a warm start, or define demonstration_facts"
            )
        return asdict(self)
