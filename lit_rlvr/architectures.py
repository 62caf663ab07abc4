"""Configurations of well-known models, for ``explain`` where the Hugging Face hub cannot be reached.

Numbers are those of each model's ``config.json`` on the hub: Qwen3-8B-Base from a copy of the file in the repository
Chen-Oliver/qwen3-8b-base; Qwen3-4B to 32B and Qwen2.5-7B from citsjtu2020/LLM-Prof (sglang/Model_Config.md), which
quotes them; base models differ from the others in the context alone (32,768, not 40,960). The parameters that they
come to are the published ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, Qwen2Config, Qwen3Config

from lit_rlvr.models import resolve_model

# width, feed-forward width, layers, heads, whether the head is the embedding
_QWEN3 = {
    "0.6B": (1024, 3072, 28, 16, True),
    "1.7B": (2048, 6144, 28, 16, True),
    "4B": (2560, 9728, 36, 32, True),
    "8B": (4096, 12288, 36, 32, False),
    "14B": (5120, 17408, 40, 40, False),
    "32B": (5120, 25600, 64, 64, False),
}
_NO_BASE = ("32B",)
"""Sizes whose base model was not published."""
_QWEN25 = {"Qwen2.5-7B": (131_072, 1e6), "Qwen2.5-Math-7B": (4096, 1e4)}
"""Context and base of the rotary embedding."""


def known_models() -> list[str]:
    """Names on the hub whose configuration this file has."""
    qwen3 = [f"Qwen/Qwen3-{size}" for size in _QWEN3]
    base = [f"Qwen/Qwen3-{size}-Base" for size in _QWEN3 if size not in _NO_BASE]
    return [*qwen3, *base, *(f"Qwen/{name}" for name in _QWEN25)]


def known_config(name: str) -> Any:
    """The configuration of a model of :func:`known_models`; None for another."""
    if name not in known_models():
        return None
    family, size = name.removeprefix("Qwen/"), name.removesuffix("-Base").removeprefix("Qwen/Qwen3-")
    if family in _QWEN25:
        context, theta = _QWEN25[family]
        return Qwen2Config(
            vocab_size=152_064, hidden_size=3584, intermediate_size=18_944, num_hidden_layers=28,
            num_attention_heads=28, num_key_value_heads=4, tie_word_embeddings=False, rms_norm_eps=1e-6,
            max_position_embeddings=context, rope_parameters={"rope_type": "default", "rope_theta": theta},
        )  # fmt: skip
    width, feed_forward, layers, heads, tied = _QWEN3[size]
    return Qwen3Config(
        vocab_size=151_936, hidden_size=width, intermediate_size=feed_forward, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=8, head_dim=128, tie_word_embeddings=tied, rms_norm_eps=1e-6,
        max_position_embeddings=32_768 if name.endswith("-Base") else 40_960,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )  # fmt: skip


def reach(name: str) -> None:
    """Ask the hub once for a model, where transformers would ask for half a minute.

    Raises:
        ValueError: When a model of the hub is neither in the cache nor within reach.
    """
    from huggingface_hub import model_info, try_to_load_from_cache

    if Path(name).is_dir() or isinstance(try_to_load_from_cache(name, "config.json"), str):
        return
    try:
        model_info(name, timeout=5)
    except Exception as error:  # the hub's and the network's own kinds
        raise ValueError(
            f"there is no folder {name}, it is not in the hub's cache on this machine, and the hub does not give it: "
            f"{str(error)[:200]}"
        ) from error


def model_config(source: str) -> tuple[Any, bool]:
    """A model's configuration, and whether the model itself is within reach.

    Raises:
        ValueError: When it is not, and its configuration is not known either.
    """
    path = resolve_model(source)
    try:
        reach(path)
    except ValueError:
        known = known_config(path)
        if known is None:
            raise
        return known, False
    return AutoConfig.from_pretrained(path), True
