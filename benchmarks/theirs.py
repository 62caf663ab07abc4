"""TRL's side: training steps of GRPOTrainer on the same model, prompts, rewards and sizes."""

from __future__ import annotations

import itertools
import os
import sys
import tempfile
from typing import Any

import transformers
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.gate import Gate
from benchmarks.models import prompt_ids, questions, responses
from benchmarks.ours import reward
from benchmarks.settings import Settings

GRPO: Any = GRPOConfig


class Gated(TrainerCallback):
    """Lets each optimiser step wait at the gate."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.gate()


def rewards(completions: list[str], **_: Any) -> list[float]:
    """TRL's reward function."""
    return [reward(text) for text in completions]


def trainer_of(settings: Settings, callbacks: list[Any]) -> Any:
    """The trainer that is measured."""
    size = settings.size
    transformers.set_seed(0)
    options: dict[str, Any] = {"per_device_train_batch_size": min(8, size.rows), "gradient_checkpointing": False}
    options |= settings.trl
    bf16 = settings.device != "cpu"
    config = GRPO(
        output_dir=tempfile.mkdtemp(), report_to="none", save_strategy="no", use_cpu=not bf16, bf16=bf16,
        gradient_accumulation_steps=size.rows // options["per_device_train_batch_size"],
        num_generations=size.responses, max_completion_length=size.new_tokens, max_steps=10_000,
        top_entropy_quantile=settings.rho, disable_tqdm=True, **options,
    )  # fmt: skip
    trainer: Any = GRPOTrainer
    return trainer(
        model=AutoModelForCausalLM.from_pretrained(settings.folder, dtype=settings.dtype),
        reward_funcs=rewards,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": questions(size, 64 * size.prompts)}),
        processing_class=AutoTokenizer.from_pretrained(settings.folder),
        callbacks=callbacks,
    )


def count(generated: tuple[list[list[int]], Any]) -> int:
    """Tokens of the responses."""
    return sum(map(len, generated[0]))


def rollouts(settings: Settings, gate: Gate) -> None:
    """Sample with the trainer's own call of ``generate``."""
    size, trainer = settings.size, trainer_of(settings, [])
    prompts = prompt_ids(size, 64 * size.prompts)
    gate.wrap(trainer, "_generate_single_turn", "rollout", count)

    def work(number: int) -> None:
        first = number % 64 * size.prompts
        repeated = [p for p in prompts[first : first + size.prompts] for _ in range(size.responses)]
        trainer._generate_single_turn(repeated, None, {}, size.responses)

    gate.repeat(work)


def main(settings: Settings) -> None:
    """Run steps until the parent says stop."""
    gate = Gate(settings.device)
    if settings.work == "rollout":
        rollouts(settings, gate)
    trainer = trainer_of(settings, [Gated(gate)])
    if settings.work == "train":
        given = itertools.count()
        trainer._generate_single_turn = lambda *_: (responses(settings.size, next(given), settings.ends), None)
    gate.wrap(trainer, "_generate_single_turn", "rollout", count)
    trainer.train()


if __name__ == "__main__":
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    main(Settings.read(sys.argv[1]))
