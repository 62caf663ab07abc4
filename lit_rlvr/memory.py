"""How much memory a run needs on one device, from the model's configuration alone: no weights are loaded.

The activations that a training step keeps are counted by running the model on fake tensors, so the estimate knows the
architecture, gradient checkpointing and attention kernel; the rest is arithmetic.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM

from lit_rlvr.head import CHUNK_ROWS
from lit_rlvr.policy import DTYPES, recompute_activations

STATES = {"Adam": 2, "AdamW": 2, "NAdam": 2, "RAdam": 2, "Adamax": 2, "RMSprop": 1, "Adagrad": 1, "SGD": 0}
"""Tensors that an optimizer keeps per parameter; SGD with momentum keeps one."""

ALIKE = ("qwen2", "qwen3")
"""Kinds of models with a list of layer types, in which layers of one type are equal."""

HEAD_COPIES, DRAW_COPIES = 3, 4
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
        cache: Keys and values of the rollout, the logits of one decoding step, and packed copies of the weights.
        gathered: The whole weights during the rollout, where each device holds a part of them otherwise.
        critic: The value model and its optimizer's state.
        critic_step: Its gradients, and the activations of its own micro-batch: the policy's last is still there.
        whole_gradients: Gradients of policy and critic that are kept whole between micro-batches, where each device
            holds a part of them otherwise.
    """

    weights: int
    reference: int
    gradients: int
    optimizer: int
    activations: int
    head: int
    cache: int
    gathered: int = 0
    critic: int = 0
    critic_step: int = 0
    whole_gradients: int = 0

    @property
    def training(self) -> int:
        """Peak of an optimiser step."""
        everything: list[int] = [getattr(self, f.name) for f in fields(self)]
        return sum(everything) - self.cache - self.gathered

    @property
    def rollout(self) -> int:
        """Peak of generation: gradients are freed before it."""
        return self.weights + self.reference + self.optimizer + self.critic + self.cache + self.gathered

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
    critic: Any = None,
    adapters: int | None = None,
    gathered_dtype: str | None = None,
    packed: bool = False,
    keeps_whole: bool = False,
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
        critic: The value model's configuration; null: there is none.
        adapters: Parameters of adapters that are trained instead of the weights; what they add to the activations is
            not counted. Null: the weights are trained.
        gathered_dtype: Dtype of the whole copy that a sharded policy samples with; null: ``dtype``.
        packed: Whether rollouts are decoded with packed copies of the weights.
        keeps_whole: Whether a sharded policy and critic keep whole gradients between micro-batches.
    """
    text, size = config.get_text_config(), DTYPES[dtype].itemsize
    activations, parameters = _counted(config, dtype, micro_rows, width, gradient_checkpointing)
    states, values, value_activations, body = STATES.get(optimizer, 2), 0, 0, 0
    if critic is not None:
        value_activations, body = _counted(critic, dtype, micro_rows, width, gradient_checkpointing)
        of_critic = critic.get_text_config()
        if not critic.tie_word_embeddings:  # one output per token takes the place of the vocabulary
            body -= of_critic.vocab_size * of_critic.hidden_size
        values = int(body * size * parameters_on_device)
    held = trained = int(parameters * size * parameters_on_device)
    head_gradient = 4 * text.vocab_size * text.hidden_size
    if adapters is not None:
        trained, head_gradient = int(adapters * max(size, 4) * parameters_on_device), 0
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    per_token = 2 * text.num_hidden_layers * heads * head_size * size
    logits = 4 * text.vocab_size
    sharded = parameters_on_device < 1 and rollout_rows > 0
    return Memory(
        weights=held if adapters is None else held + trained,
        reference=held if reference else 0,
        gradients=trained,
        optimizer=states * trained,
        activations=activations,
        head=HEAD_COPIES * min(head_rows, micro_rows * width) * logits + head_gradient,
        cache=rollout_rows * (width * per_token + DRAW_COPIES * logits) + packed * parameters * size,
        gathered=parameters * DTYPES[gathered_dtype or dtype].itemsize if sharded else 0,
        critic=(1 + states) * values,
        critic_step=values + value_activations,
        # FSDP2 adds them up in the dtype that it reduces in.
        whole_gradients=keeps_whole * max(size, 4) * (body + (parameters if adapters is None else adapters)),
    )


def _counted(config: Any, dtype: str, rows: int, width: int, checkpointing: bool) -> tuple[int, int]:
    """Bytes that a micro-batch keeps for its backward pass, recomputation included, and the number of parameters."""
    activations, parameters = _of_layers(config, dtype, rows, width, False)
    if checkpointing:
        # What is kept between layers, and one layer's activations while it is recomputed.
        one_layer = activations // config.get_text_config().num_hidden_layers
        activations = one_layer + _of_layers(config, dtype, rows, width, True)[0]
    return activations, parameters


def _of_layers(config: Any, dtype: str, rows: int, width: int, checkpointing: bool) -> tuple[int, int]:
    """As :func:`_on_fake_tensors`; where all layers are alike, one and two of them tell what each adds."""
    layers = config.get_text_config().num_hidden_layers
    if config.model_type not in ALIKE or len(set(config.layer_types)) > 1:
        return _on_fake_tensors(config, dtype, rows, width, checkpointing)
    shallow = [copy.deepcopy(config) for _ in range(2)]
    for number, cut in enumerate(shallow, 1):
        cut.num_hidden_layers, cut.layer_types = number, config.layer_types[:number]
    one, two = (_on_fake_tensors(cut, dtype, rows, width, checkpointing) for cut in shallow)
    activations, parameters = (a + (layers - 1) * (b - a) for a, b in zip(one, two, strict=True))
    return activations, parameters


def _on_fake_tensors(config: Any, dtype: str, rows: int, width: int, checkpointing: bool) -> tuple[int, int]:
    """Bytes that a forward pass keeps for the backward pass, and the number of parameters."""
    kept: dict[int, int] = {}
    keep_alive: list[torch.Tensor] = []

    with FakeTensorMode(), torch.random.fork_rng():
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype]).train()
        if checkpointing:
            recompute_activations(model)
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
