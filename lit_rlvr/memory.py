"""How much memory a run needs on one device, from the model's configuration alone: no weights are loaded.

The activations that a training step keeps are counted by running the model on fake tensors, so the estimate knows the
architecture, gradient checkpointing and attention kernel; the rest is arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM

from lit_rlvr.head import CHUNK_ROWS
from lit_rlvr.policy import DTYPES

STATES = {"Adam": 2, "AdamW": 2, "NAdam": 2, "RAdam": 2, "Adamax": 2, "RMSprop": 1, "Adagrad": 1, "SGD": 0}
"""Tensors that an optimizer keeps per parameter; SGD with momentum keeps one."""

LOGIT_COPIES = 4
"""Float32 [rows, vocabulary] tensors alive at once: in the head's chunk, and when a token is drawn."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, by what they are for.

    Args:
        weights: The policy.
        reference: The frozen reference model.
        gradients: One per trained parameter.
        optimizer: The optimizer's state.
        activations: What the largest micro-batch keeps for its backward pass.
        head: Logits of one chunk and the head's gradient in float32.
        cache: Keys and values of the rollout, and the logits of one decoding step.
    """

    weights: int
    reference: int
    gradients: int
    optimizer: int
    activations: int
    head: int
    cache: int

    @property
    def training(self) -> int:
        """Peak of an optimiser step."""
        everything: list[int] = [getattr(self, f.name) for f in fields(self)]
        return sum(everything) - self.cache

    @property
    def rollout(self) -> int:
        """Peak of generation: gradients are freed before it."""
        return self.weights + self.reference + self.optimizer + self.cache

    @property
    def peak(self) -> int:
        """The larger of the two."""
        return max(self.training, self.rollout)


def estimate(
    config: Any,
    *,
    dtype: str,
    micro_rows: int,
    width: int,
    rollout_rows: int,
    head_rows: int = CHUNK_ROWS,
    optimizer: str = "AdamW",
    reference: bool = False,
    gradient_checkpointing: bool = False,
    parameters_on_device: float = 1.0,
) -> Memory:
    """Estimate the memory of one device.

    Args:
        config: The model's Hugging Face configuration.
        dtype: Dtype of the weights.
        micro_rows: Rows of the largest micro-batch.
        width: Prompt and response together, in tokens.
        rollout_rows: Responses decoded at a time.
        head_rows: Rows of logits held at a time.
        optimizer: Class name of the optimizer.
        reference: Whether a reference model is loaded.
        gradient_checkpointing: Whether activations are recomputed.
        parameters_on_device: Share of weights, gradients and optimizer state that one device holds (1 over the number
            of devices for a sharded strategy).
    """
    text, size = config.get_text_config(), DTYPES[dtype].itemsize
    activations, parameters = _on_fake_tensors(config, dtype, micro_rows, width, False)
    if gradient_checkpointing:
        # What is kept between layers, and one layer's activations while it is recomputed.
        one_layer = activations // text.num_hidden_layers
        activations = one_layer + _on_fake_tensors(config, dtype, micro_rows, width, True)[0]
    held = int(parameters * size * parameters_on_device)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    per_token = 2 * text.num_hidden_layers * heads * head_size * size
    logits = 4 * LOGIT_COPIES * text.vocab_size
    return Memory(
        weights=held,
        reference=held if reference else 0,
        gradients=held,
        optimizer=STATES.get(optimizer, 2) * held,
        activations=activations,
        head=min(head_rows, micro_rows * width) * logits + 4 * text.vocab_size * text.hidden_size,
        cache=rollout_rows * (width * per_token + logits),
    )


def _on_fake_tensors(config: Any, dtype: str, rows: int, width: int, checkpointing: bool) -> tuple[int, int]:
    """Bytes that a forward pass keeps for the backward pass, and the number of parameters."""
    kept: dict[int, int] = {}
    keep_alive: list[torch.Tensor] = []

    with FakeTensorMode(), torch.random.fork_rng():
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype]).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        own = {p.untyped_storage()._cdata for p in model.parameters()}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage.nbytes()
                keep_alive.append(tensor)  # so that no later storage takes its address
            return tensor

        ids = torch.zeros(rows, width, dtype=torch.int64)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        keep_alive.append(output)
        kept[output.untyped_storage()._cdata] = output.untyped_storage().nbytes()
        parameters = sum(p.numel() for p in model.parameters())
    return sum(kept.values()), parameters
