"""TRL's side: training steps of GRPOTrainer on the same model, prompts, rewards and sizes."""

from __future__ import annotations

import os
import sys
import tempfile
from typing import Any

import transformers
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.gate import Gate
from benchmarks.models import questions
from benchmarks.ours import reward
from benchmarks.settings import Settings

GRPO: Any = GRPOConfig


class Gated(TrainerCallback):  # type: ignore[misc]
    """Lets each optimiser step wait at the gate."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.gate()


def rewards(completions: list[str], **_: Any) -> list[float]:
    """TRL's reward function."""
    return [reward(text) for text in completions]


def main(settings: Settings) -> None:
    """Run steps until the parent says stop."""
    size = settings.size
    gate = Gate(settings.device)
    transformers.set_seed(0)
    rows = size.prompts * size.responses
    micro = settings.trl.pop("per_device_train_batch_size", 8)
    bf16 = settings.device != "cpu"
    config = GRPO(
        output_dir=tempfile.mkdtemp(), report_to="none", save_strategy="no", use_cpu=not bf16, bf16=bf16,
        per_device_train_batch_size=micro, gradient_accumulation_steps=rows // micro,
        num_generations=size.responses, max_completion_length=size.new_tokens, max_steps=10_000,
        top_entropy_quantile=settings.rho, disable_tqdm=True,
        **{"gradient_checkpointing": False, **settings.trl},
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(settings.folder, dtype="bfloat16" if bf16 else "float32")
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=rewards,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": questions(size, 64 * size.prompts)}),
        processing_class=AutoTokenizer.from_pretrained(settings.folder),
        callbacks=[Gated(gate)],
    )
    gate.wrap(trainer, "_generate_single_turn", "rollout")
    trainer.train()


if __name__ == "__main__":
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    main(Settings.read(sys.argv[1]))
