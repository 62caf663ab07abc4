"""The models of a run: policy, reference and critic, opened as its strategy wants them, and the policy saved."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import AutoTokenizer

from lit_rlvr.critic import Critic, ValueModel
from lit_rlvr.evaluate import EvaluationSteps
from lit_rlvr.kl import KLPenalty
from lit_rlvr.lora import LoRA, WithoutAdapters
from lit_rlvr.models import resolve_model, save_model
from lit_rlvr.policy import Policy, load_policy
from lit_rlvr.settings import Batch
from lit_rlvr.sharding import open_model, whole_weights


class RunModels(EvaluationSteps):
    """The part of the module that holds its models."""

    model: str
    dtype_name: str
    gradient_checkpointing: bool
    lora: LoRA | None
    kl: KLPenalty | None
    critic_settings: Critic | None
    reference_path: str | None
    batch: Batch
    base: str | None
    """The model that a warm start began with."""
    policy: Any
    critic: Any
    reference: Any
    """The frozen reference model. Outside of the module tree, so that it is neither trained, nor wrapped, nor saved."""

    @cached_property
    def tokenizer(self) -> Any:
        """The policy's tokenizer."""
        return AutoTokenizer.from_pretrained(resolve_model(self.model))

    def start_from(self, folder: str | Path) -> None:
        """Train the model in ``folder``, a warm start of ``model``, instead of ``model`` itself."""
        self.base, self.model = self.model, str(folder)

    def configure_model(self) -> None:
        if self.policy is not None:
            return
        options: dict[str, Any] = {"gradient_checkpointing": self.gradient_checkpointing, "lora": self.lora}
        self.policy = self.open_policy(self.model, **options)
        if self.kl is not None and self.lora is not None and self.reference_path is None:
            object.__setattr__(self, "reference", WithoutAdapters(self.policy))
        elif self.kl is not None:
            reference = self.open_policy(self.reference_path or self.model)
            object.__setattr__(self, "reference", reference.requires_grad_(False).eval())
        if self.critic_settings is not None:
            start = self.critic_settings.model or self.model
            self.critic = self.open_policy(start, ValueModel, gradient_checkpointing=self.gradient_checkpointing)

    def open_policy(self, model: str, load: Callable[..., Any] = load_policy, **options: Any) -> Any:
        """Load a policy or critic in the way of this run's strategy, whole or spread over the devices.

        Every rank calls it.
        """
        strategy = None if self._trainer is None else self.trainer.strategy
        options["layout"] = self.batch.layout
        return open_model(load, resolve_model(model), self.dtype_name, strategy, **options)

    def place(self, policy: Any) -> Any:
        """Move a policy that Lightning does not know to this rank's device; a sharded one is there."""
        return policy.to(self.device) if self.device_mesh is None and isinstance(policy, Policy) else policy

    def save_policy(self, folder: str | Path) -> Path:
        """Write policy and tokenizer as a Hugging Face folder for ``from_pretrained``; every rank calls it.

        With ``lora`` the folder holds the adapters alone, and the name of the model that they belong to.
        """
        path = Path(folder)
        whole = whole_weights(self.policy, trained_only=self.lora is not None)
        weights = {name.removeprefix("hf."): value for name, value in whole.items()}
        if self.trainer.is_global_zero:
            wrapped = isinstance(self.policy, FullyShardedDataParallel)  # and so are its layers
            shell = load_policy(resolve_model(self.model), self.dtype_name, empty=True) if wrapped else self.policy
            save_model(shell.hf, self.tokenizer, path, weights)
        return path
