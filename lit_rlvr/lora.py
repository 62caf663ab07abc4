"""Low-rank adapters: a frozen model learns through two thin matrices beside each of its linear layers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from lit_rlvr.near import did_you_mean

ADAPTER = "adapter_config.json"
ALL = "all-linear"
NEEDED = "model.lora needs the package peft: pip install 'lit-rlvr[lora]'"


@dataclass(frozen=True)
class LoRA:
    """Train adapters of rank ``r`` instead of the weights; peft makes them.

    The reference model is then the policy without them, and costs no memory. There is no dropout: a probability ratio
    compares two policies, not two dropout masks. Source: Hu et al. 2021, arXiv 2106.09685.

    Args:
        r: Rank.
        alpha: Adapters are scaled by alpha / r.
        target_modules: Names of linear layers, as in ``[q_proj, v_proj]``; ``all-linear``: all but the head.
        seed: Of the adapters' first matrices; the second begin at zero, so training begins at the model itself.

    Raises:
        ValueError: When a number is out of range.
    """

    r: int = 8
    alpha: int = 16
    target_modules: str | list[str] = ALL
    seed: int = 0

    def __post_init__(self) -> None:
        if self.r < 1 or self.alpha <= 0 or not self.target_modules:
            raise ValueError(f"lora needs r and alpha above 0 and some target_modules, got {self}")
        if isinstance(self.target_modules, str) and self.target_modules != ALL:
            raise ValueError(
                f"lora.target_modules must be {ALL} or a list of names, as in [q_proj, v_proj], got "
                f"{self.target_modules!r}"
            )


def add_adapters(hf: PreTrainedModel, lora: LoRA) -> None:
    """Freeze ``hf`` and put trainable adapters into it, which change nothing yet.

    Raises:
        ValueError: When peft is not installed, a layer does not exist, or the head or an embedding is named.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ValueError(NEEDED) from error
    check_targets(hf, lora)
    config = LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, target_modules=lora.target_modules, lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    with torch.random.fork_rng(), hf.device:
        torch.manual_seed(lora.seed)
        hf.add_adapter(config)
    wide = torch.float64 if hf.dtype == torch.float64 else torch.float32
    for layer in tuned_layers(hf):
        for name, parameter in layer.named_parameters():
            if "lora_" in name:  # peft follows the weights' dtype, but not on the meta device
                parameter.data = parameter.data.to(wide)


def adapter_parameters(config: Any, lora: LoRA) -> int:
    """How many parameters the adapters of a model of this Hugging Face configuration have.

    Raises:
        ValueError: When a layer does not exist, or the head or an embedding is named.
    """
    with torch.device("meta"):
        hf = AutoModelForCausalLM.from_config(config)
    check_targets(hf, lora)
    head, chosen = hf.get_output_embeddings(), lora.target_modules
    every = [(name, layer) for name, layer in hf.named_modules() if isinstance(layer, nn.Linear) and layer is not head]
    if not isinstance(chosen, str):
        every = [(n, layer) for n, layer in every if any(n == t or n.endswith(f".{t}") for t in chosen)]
    return sum(lora.r * (layer.in_features + layer.out_features) for _, layer in every)


def check_targets(hf: PreTrainedModel, lora: LoRA) -> None:
    """Refuse adapters on the head, whose gradient is taken without them, and on embeddings, which may be tied to it.

    Raises:
        ValueError: With the layer's name, or a name that no layer has.
    """
    if isinstance(lora.target_modules, str):
        return  # peft itself leaves the head out of all-linear
    ends = {id(hf.get_output_embeddings()): "head", id(hf.get_input_embeddings()): "embedding"}
    found = set[str]()
    for name, module in hf.named_modules():
        named = {target for target in lora.target_modules if name == target or name.endswith(f".{target}")}
        found |= named
        if named and id(module) in ends:
            raise ValueError(
                f"lora.target_modules names {name}, the {ends[id(module)]} of {type(hf).__name__}: only layers between "
                "embedding and head can have adapters"
            )
    if unknown := [target for target in lora.target_modules if target not in found]:
        names = sorted({n.rpartition(".")[2] for n, layer in hf.named_modules() if isinstance(layer, nn.Linear)})
        hint = did_you_mean(unknown[0], names) or f"; it has {', '.join(names)}"
        raise ValueError(f"lora.target_modules: {type(hf).__name__} has no layer {unknown[0]!r}{hint}")


def tuned_layers(module: nn.Module) -> list[Any]:
    """The layers of ``module`` that have an adapter."""
    try:
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError:
        return []
    return [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]


@contextmanager
def adapters_off(module: nn.Module) -> Iterator[None]:
    """Inside, ``module`` computes without its adapters."""
    layers = tuned_layers(module)
    for layer in layers:
        # Not enable_adapters(False), which also freezes them: FSDP2 and DDP have noted what is trained.
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


class WithoutAdapters:
    """The model that a policy's adapters were added to: its reference, for no memory.

    Args:
        policy: The policy; it computes for both.
    """

    def __init__(self, policy: Any) -> None:
        self.policy = policy

    @property
    def device(self) -> torch.device:
        return self.policy.device  # type: ignore[no-any-return]

    @property
    def hf(self) -> Any:
        return self.policy.hf

    @property
    def layout(self) -> Any:
        return self.policy.layout

    @property
    def narrowed(self) -> torch.dtype | None:
        return self.policy.narrowed  # type: ignore[no-any-return]

    def __call__(self, *arguments: Any, **more: Any) -> Any:
        with adapters_off(self.policy):
            return self.policy(*arguments, **more)


def base_of(path: str) -> str:
    """The model of a folder of adapters, or ``path`` itself if it is none."""
    config = Path(path) / ADAPTER
    return str(json.loads(config.read_text())["base_model_name_or_path"]) if config.is_file() else path


def merge_folder(hf: PreTrainedModel, folder: str) -> PreTrainedModel:
    """Add the adapters in ``folder`` to the weights of their model.

    Raises:
        ValueError: When peft is not installed.
    """
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ValueError(NEEDED) from error
    merged: PreTrainedModel = PeftModel.from_pretrained(hf, folder).merge_and_unload()
    return merged


def merged_weights(hf: PreTrainedModel, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a model, under the names that they have without adapters, with the adapters added.

    One matrix at a time is made for it.

    Args:
        hf: The model, which may be on the meta device; it says how adapters are scaled.
        weights: Whole tensors of its state dict, an adapter's together with those of its layer. None is changed.
    """
    merged = {}
    for name, value in weights.items():
        if ".lora_" in name:
            continue
        owner, _, leaf = name.rpartition(".base_layer.")
        if owner and leaf == "weight":
            layer: Any = hf.get_submodule(owner)
            thin, wide = (weights[f"{owner}.lora_{matrix}.default.weight"] for matrix in "AB")
            product = wide @ thin
            product = (product.T if layer.fan_in_fan_out else product) * layer.scaling["default"]
            value = (value + product).to(value.dtype)
        merged[name.replace(".base_layer.", ".")] = value
    return merged
