"""Any procedural dataset of the reasoning-gym package (Apache-2.0), with its own verifier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from lit_rlvr.near import did_you_mean
from lit_rlvr.tasks.base import Prompt, Score, Split, Task

FULL_SCORE = 0.99
"""reasoning-gym gives partial credit, even for an answer that merely contains the right one; less is wrong."""

SEED_STRIDE = 1_000_000
"""reasoning-gym makes problem i of seed s from s + i: seeds that stand closer share problems."""

INSTRUCTION = "\nGive the final answer between <answer> and </answer>."


@dataclass(frozen=True)
class ReasoningGym(Task):
    """Problems from ``reasoning_gym``, made on the spot from a seed; rewards are 1 or 0.

    Args:
        dataset: The dataset's name, for example ``chain_sum``.
        train_size: Number of training problems.
        val_size: Number of problems in each of the two held-out splits.
        seed: Seed of the training problems; the held-out splits use other seeds.
        config: The dataset's own options.
        instruction: Appended to every question.

    Raises:
        ValueError: When reasoning_gym has no such dataset, or refuses its options.
    """

    dataset: str
    train_size: int = 1000
    val_size: int = 100
    seed: int = 0
    config: dict[str, Any] = field(default_factory=dict)
    instruction: str = INSTRUCTION

    def __post_init__(self) -> None:
        from reasoning_gym.factory import DATASETS

        if self.dataset not in DATASETS:
            raise ValueError(f"reasoning_gym has no dataset {self.dataset!r}{did_you_mean(self.dataset, DATASETS)}")
        if self.train_size < 1 or self.val_size < 1:
            raise ValueError("ReasoningGym.train_size and val_size must be at least 1")

    @cached_property
    def _sets(self) -> dict[str, Any]:
        import reasoning_gym

        try:
            return {
                split: reasoning_gym.create_dataset(
                    self.dataset, size=size, seed=(self.seed * 3 + offset) * SEED_STRIDE, **self.config
                )
                for offset, (split, size) in enumerate(
                    (("train", self.train_size), ("val", self.val_size), ("test", self.val_size))
                )
            }
        except (TypeError, AssertionError) as error:
            raise ValueError(f"reasoning_gym refuses the options of {self.dataset!r}: {error}") from error

    def prompts(self, split: Split) -> Sequence[Prompt]:
        return [
            Prompt(i, entry["question"] + self.instruction, str(entry["answer"]), {"split": split})
            for i, entry in enumerate(self._sets[split])
        ]

    def score(self, prompt: Prompt, response: str) -> Score:
        from reasoning_gym.utils import extract_answer

        answer = extract_answer(response)
        if answer is None:
            return Score(0.0, False)
        dataset = self._sets[prompt.meta["split"]]
        correct = dataset.score_answer(answer, dataset[prompt.index]) >= FULL_SCORE
        return Score(float(correct), correct, answer)
