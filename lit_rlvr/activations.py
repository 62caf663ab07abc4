"""What a forward pass keeps for its backward pass, counted by running the model on fake tensors: no weights are loaded.

So the count knows the architecture, gradient checkpointing, autocast and the attention kernel.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM

from lit_rlvr.policy import recompute_activations

ALIKE = ("qwen2", "qwen3")
"""Kinds of models with a list of layer types, in which layers of one type are equal."""


@dataclass(frozen=True)
class Counted:
    """What one micro-batch keeps, and the parameters of the model.

    Args:
        activations: Bytes that are kept for the backward pass, recomputation included.
        parameters: Of the whole model.
        layer: Of its largest decoder layer.
        outside: Of embedding, head and everything else that is in no decoder layer.
    """

    activations: int
    parameters: int
    layer: int
    outside: int


@dataclass(frozen=True)
class Pass:
    """A forward pass to count.

    Args:
        rows: Sequences.
        width: Tokens of each.
        dtype: Of the weights that it computes with.
        autocast: Whether it runs under bfloat16 autocast.
        checkpointing: Whether activations are recomputed in the backward pass.
    """

    rows: int
    width: int
    dtype: torch.dtype
    autocast: bool = False
    checkpointing: bool = False

    def count(self, config: Any) -> Counted:
        """Count it for a model with a Hugging Face configuration."""
        counted = self._of_layers(config, False)
        if not self.checkpointing:
            return counted
        # What is kept between layers, and one layer's activations while it is recomputed.
        one_layer = counted.activations // config.get_text_config().num_hidden_layers
        kept = self._of_layers(config, True).activations
        return Counted(one_layer + kept, counted.parameters, counted.layer, counted.outside)

    def _of_layers(self, config: Any, checkpointing: bool) -> Counted:
        """As :meth:`_on_fake_tensors`; where all layers are alike, one and two of them tell what each adds."""
        layers = config.get_text_config().num_hidden_layers
        if config.model_type not in ALIKE or len(set(config.layer_types)) > 1:
            return self._on_fake_tensors(config, checkpointing)
        shallow = [copy.deepcopy(config) for _ in range(2)]
        for number, cut in enumerate(shallow, 1):
            cut.num_hidden_layers, cut.layer_types = number, config.layer_types[:number]
        one, two = (self._on_fake_tensors(cut, checkpointing) for cut in shallow)
        activations = one.activations + (layers - 1) * (two.activations - one.activations)
        return Counted(activations, one.outside + layers * one.layer, one.layer, one.outside)

    def _on_fake_tensors(self, config: Any, checkpointing: bool) -> Counted:
        kept: dict[int, int] = {}
        keep_alive: list[torch.Tensor] = []

        with FakeTensorMode(), torch.random.fork_rng():
            model = AutoModelForCausalLM.from_config(config, dtype=self.dtype).train()
            if checkpointing:
                recompute_activations(model)
            own = {p.untyped_storage()._cdata for p in model.parameters()}

            def pack(tensor: torch.Tensor) -> torch.Tensor:
                storage = tensor.untyped_storage()
                if storage._cdata not in own:
                    kept[storage._cdata] = storage.nbytes()
                    keep_alive.append(tensor)  # so that no later storage takes its address
                return tensor

            ids = torch.zeros(self.rows, self.width, dtype=torch.int64)
            narrow = torch.autocast("cpu", torch.bfloat16, enabled=self.autocast)
            with narrow, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                output = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            keep_alive.append(output)
            kept[output.untyped_storage()._cdata] = output.untyped_storage().nbytes()
            names = set(model._no_split_modules or [])
            layers = [sum(p.numel() for p in m.parameters()) for m in model.modules() if type(m).__name__ in names]
            parameters = sum(p.numel() for p in model.parameters())
        return Counted(sum(kept.values()), parameters, max(layers, default=0), parameters - sum(layers))
