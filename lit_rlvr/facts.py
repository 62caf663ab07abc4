"""What ``explain`` knows of machines, model and problems, with or without the hub."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from lit_rlvr.architectures import model_config
from lit_rlvr.tasks.readers import UnreachableError

SHARDED = ("FSDPStrategy", "FSDP1Strategy", "ModelParallelStrategy", "FSDP2Strategy")


@dataclass(frozen=True)
class Cluster:
    """Where the run would go.

    Args:
        devices: Devices over all nodes.
        sharded: Whether weights, gradients and optimizer state are spread over them.
    """

    devices: int
    sharded: bool

    @classmethod
    def of(cls, trainer: dict[str, Any]) -> Cluster:
        """Read the ``trainer`` section of a configuration; ``auto`` counts as one device."""
        devices = trainer.get("devices", 1)
        if isinstance(devices, (list, tuple)):
            each = len(devices)
        else:
            each = int(devices) if str(devices).isdigit() else 1
        strategy = trainer.get("strategy", "auto")
        name = strategy if isinstance(strategy, str) else type(strategy).__name__
        return cls(each * int(trainer.get("num_nodes") or 1), name in SHARDED or name.startswith("fsdp"))


@dataclass(frozen=True)
class Facts:
    """What is known of model and problems here.

    Args:
        config: The policy's Hugging Face configuration.
        critic: The value model's, or None where there is none.
        problems: Number of training problems; None where they cannot be read here.
        prompt: Longest training prompt in tokens, or the longest that would be used.
        held_out: Number of validation problems, by set.
        notes: What could not be had, in sentences.
    """

    config: Any
    critic: Any
    problems: int | None
    prompt: int
    held_out: dict[str | None, int]
    notes: list[str]

    @classmethod
    def of(cls, module: Any, data: Any) -> Facts:
        """Ask for everything once."""
        config, there = model_config(module.model)
        critic = None
        if module.critic_settings is not None:
            critic, _ = model_config(module.critic_settings.model or module.model)
        notes = [] if there else [f"{module.model} is not within reach; its configuration is the one known here"]
        try:
            if not there:
                raise UnreachableError("without its tokenizer")
            lengths = [len(encoded.tokens) for encoded in data.encoded("train")]
            held_out = Counter(encoded.prompt.benchmark for encoded in data.encoded("val"))
        except UnreachableError as error:
            prompt = data.max_prompt_tokens or 0
            assumed = (
                f"prompts count as {prompt} tokens" if prompt else "prompts are not counted, set max_prompt_tokens"
            )
            notes.append(f"the problems cannot be read here ({error}): their numbers are left out, {assumed}")
            return cls(config, critic, None, prompt, {}, notes)
        return cls(config, critic, len(lengths), max(lengths), dict(held_out), notes)

    def width(self, module: Any) -> int:
        """Longest prompt and response together, in tokens."""
        longest: int = self.prompt + module.sampling.max_new_tokens
        return longest
