"""A policy's weights under the names of a Hugging Face checkpoint, a decoder layer at a time."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from lit_rlvr.lora import merged_weights
from lit_rlvr.policy import Policy


@torch.no_grad()
def named_weights(policy: Policy) -> Iterator[tuple[str, Tensor]]:
    """Every weight of the policy once, named and shaped as ``save_pretrained`` would write it.

    The one road by which weights leave for an engine. Every rank goes through it, because a parameter that is spread
    over ranks is gathered on the way; no more than a decoder layer is gathered at a time. Of tied weights the first is
    given. Adapters are added to the weights that they belong to.

    Args:
        policy: The policy; its weights are not copied unless they are gathered, converted or have adapters.

    Yields:
        Name and tensor, on the policy's device and in its dtype.
    """
    seen = set[int]()
    for _, group in groupby(policy.hf.state_dict(keep_vars=True).items(), key=lambda item: _layer(item[0])):
        layer = {}
        for name, tensor in group:
            if id(tensor) not in seen:
                seen.add(id(tensor))
                layer[name] = _whole(tensor.detach())
        # Some models hold in one tensor what checkpoints have in several, such as a layer's experts.
        yield from revert_weight_conversion(policy.hf, merged_weights(policy.hf, layer)).items()


def _layer(name: str) -> str:
    """The decoder layer that a weight belongs to, or the weight's own name; its adapter is of the same.

    >>> _layer("model.layers.3.mlp.experts.7.w1"), _layer("lm_head.weight"), _layer("into.lora_A.default.weight")
    ('model.layers.3', 'lm_head.weight', 'into')
    """
    parts = name.split(".")
    ends = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: ends[0] + 1]) if ends else name.split(".base_layer.")[0].split(".lora_")[0]


def _whole(tensor: Tensor) -> Tensor:
    """The tensor, gathered if it is spread over ranks."""
    full_tensor = getattr(tensor, "full_tensor", None)
    return tensor if full_tensor is None else full_tensor()
