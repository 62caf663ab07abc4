"""How much memory a run needs on one device, from the model's configuration alone: no weights are loaded.

:mod:`lit_rlvr.activations` counts what a training step keeps; the rest is arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from lit_rlvr.activations import Counted, Pass
from lit_rlvr.engines.slots import SPARE, widest
from lit_rlvr.head import CHUNK_ROWS
from lit_rlvr.policy import DTYPES

STATES = {"Adam": 2, "AdamW": 2, "NAdam": 2, "RAdam": 2, "Adamax": 2, "RMSprop": 1, "Adagrad": 1, "SGD": 0}
"""Tensors that an optimizer keeps per parameter; SGD with momentum keeps one."""

HEAD_COPIES, DRAW_COPIES = 3, 4
"""Float32 [rows, vocabulary] tensors alive at once: in the head's chunk, and when a token is drawn."""
NARROW_COPIES = 2
"""As many in a narrower dtype, where the head computes in one: their gradient, and the logits if they are rounded."""
GATHERED_LAYERS = 2
"""Decoder layers of a sharded model that are whole at a time: the one at work and the next, which is on its way; and
as many gradients, in the dtype that they are averaged in."""


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
        gathered_parts: Embedding, head and two decoder layers with their gradients, which are whole during a training
            step where each device holds a part of them otherwise.
        host: Weights, gradients and optimizer state that wait in the memory of the CPU, for each device; not on it.
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
    gathered_parts: int = 0
    host: int = 0

    @property
    def training(self) -> int:
        """Peak of an optimiser step."""
        everything: list[int] = [getattr(self, f.name) for f in fields(self)]
        return sum(everything) - self.cache - self.gathered - self.host

    @property
    def rollout(self) -> int:
        """Peak of generation: gradients are freed before it."""
        return self.weights + self.reference + self.optimizer + self.critic + self.cache + self.gathered

    @property
    def peak(self) -> int:
        """The larger of the two."""
        return max(self.training, self.rollout)


@dataclass(frozen=True)
class Numbers:
    """In which numbers, and where, a run keeps and computes.

    Args:
        dtype: Dtype of the weights.
        computes: Dtype in which sharded weights are computed with; null: ``dtype``.
        samples: Dtype of the weights that rollouts are decoded with; null: ``dtype``.
        autocast: Whether passes run under bfloat16 autocast.
        share: Share of weights, gradients and optimizer state that one device holds: 1 over the number of devices for a
            sharded strategy.
        offload: Whether that share waits in the memory of the CPU.
        keeps_whole: Whether a sharded policy and critic keep whole gradients between micro-batches.
        widens: Whether the device gives products of narrow matrices in float32.
    """

    dtype: str = "float32"
    computes: str | None = None
    samples: str | None = None
    autocast: bool = False
    share: float = 1.0
    offload: bool = False
    keeps_whole: bool = False
    widens: bool = False

    @property
    def size(self) -> int:
        """Bytes of a weight as it is kept."""
        return DTYPES[self.dtype].itemsize

    @property
    def wide(self) -> int:
        """Bytes of a gradient that is added up."""
        return max(self.size, 4)

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of the weights in a training step."""
        return DTYPES[self.computes or self.dtype]

    @property
    def sample_size(self) -> int:
        """Bytes of a weight in a rollout."""
        return DTYPES[self.samples or self.dtype].itemsize

    def kept(self, parameters: int) -> int:
        """Bytes of so many parameters as one device keeps them."""
        return int(parameters * self.size * self.share)


def estimate(
    config: Any,
    numbers: Numbers,
    *,
    micro_rows: int,
    width: int,
    rollout_rows: int,
    head_rows: int = CHUNK_ROWS["cpu"],
    optimizer: str = "AdamW",
    reference: bool = False,
    gradient_checkpointing: bool = False,
    critic: Any = None,
    adapters: int | None = None,
    packed: bool = False,
    refilled: bool = False,
) -> Memory:
    """Estimate the memory of one device.

    Args:
        config: The model's Hugging Face configuration.
        numbers: In which numbers, and where.
        micro_rows: Rows of the largest micro-batch.
        width: Prompt and response together, in tokens.
        rollout_rows: Responses decoded at a time.
        head_rows: Rows of logits held at a time.
        optimizer: Class name of the optimizer.
        reference: Whether a reference model is loaded.
        gradient_checkpointing: Whether activations are recomputed.
        critic: The value model's configuration; null: there is none.
        adapters: Parameters of adapters that are trained instead of the weights; what they add to the activations is
            not counted. Null: the weights are trained.
        packed: Whether rollouts are decoded with packed copies of the weights.
        refilled: Whether waiting responses take the place of finished ones, which takes longer storage.
    """
    forward = Pass(micro_rows, width, numbers.compute_dtype, numbers.autocast, gradient_checkpointing)
    policy = forward.count(config)
    value = None if critic is None else _without_head(forward.count(critic), critic)
    kept = _kept(policy, value, numbers, STATES.get(optimizer, 2), reference, adapters)
    of_critic = kept.pop("critic_gradients")
    learners = [policy] if value is None else [policy, value]
    trained = sum(c.parameters for c in learners) + (0 if adapters is None else adapters - policy.parameters)
    columns = widest(width, SPARE) if refilled else width
    narrow, sharded = numbers.compute_dtype.itemsize, numbers.share < 1
    parts = [c.outside * narrow + GATHERED_LAYERS * c.layer * (narrow + numbers.wide) for c in learners]
    return Memory(
        **(dict.fromkeys(kept, 0) if numbers.offload else kept),
        activations=policy.activations,
        head=_head(config, numbers, min(head_rows, micro_rows * width), adapters is None),
        cache=_cache(config, numbers, rollout_rows, columns) + packed * policy.parameters * numbers.size,
        gathered=policy.parameters * numbers.sample_size if sharded and rollout_rows else 0,
        critic_step=(0 if numbers.offload else of_critic) + (0 if value is None else value.activations),
        # FSDP2 adds them up in the dtype that it reduces in.
        whole_gradients=numbers.keeps_whole * numbers.wide * trained,
        gathered_parts=max(parts) if sharded else 0,
        host=numbers.offload * (sum(kept.values()) + of_critic),
    )


def _without_head(counted: Counted, config: Any) -> Counted:
    """A value model, in which one output per token takes the place of the vocabulary."""
    text = config.get_text_config()
    less = 0 if config.tie_word_embeddings else text.vocab_size * text.hidden_size
    return replace(counted, parameters=counted.parameters - less, outside=counted.outside - less)


def _kept(
    policy: Counted, value: Counted | None, numbers: Numbers, states: int, reference: bool, adapters: int | None
) -> dict[str, int]:
    """Bytes of what is kept from step to step, by the names of :class:`Memory`, and of the critic's gradients."""
    weights = trained = numbers.kept(policy.parameters)
    if adapters is not None:
        trained = int(adapters * numbers.wide * numbers.share)
    values = 0 if value is None else numbers.kept(value.parameters)
    return {
        "weights": weights if adapters is None else weights + trained,
        "reference": weights if reference else 0,
        "gradients": trained,
        "optimizer": states * trained,
        "critic": (1 + states) * values,
        "critic_gradients": values,
    }


def _head(config: Any, numbers: Numbers, rows: int, trained: bool) -> int:
    """Bytes of the head's chunk of ``rows``, and of the gradient of its weight if that is trained."""
    text = config.get_text_config()
    size = 2 if numbers.autocast else numbers.compute_dtype.itemsize
    weight, narrow = text.vocab_size * text.hidden_size, size if size < 4 else 0
    chunk: int = rows * text.vocab_size * (HEAD_COPIES * 4 + (NARROW_COPIES - numbers.widens) * narrow)
    beside = 0 if numbers.widens else narrow  # a chunk's product in a narrower dtype stands beside the sum
    gradient = weight * (4 + beside) if trained else 0
    return chunk + gradient + (weight * size if numbers.autocast else 0)


def _cache(config: Any, numbers: Numbers, rows: int, width: int) -> int:
    """Bytes of keys and values of ``rows`` responses, and of what is needed to draw a token for each."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    size = 2 if numbers.autocast else numbers.sample_size
    of_row: int = width * 2 * text.num_hidden_layers * heads * head_size * size
    return rows * (of_row + DRAW_COPIES * 4 * int(text.vocab_size))
