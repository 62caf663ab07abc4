"""Tiny random language models and a character tokenizer, made in memory: what every test of a model runs on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

CHARACTERS = "0123456789abcdefghijklmnopqrstuvwxyz+-*/=()?.# \n"
PAD, EOS = 0, 1
VOCABULARY = 2 + len(CHARACTERS)
CONTEXT = 64
SOFTCAP = 3.0
LOGITS_SCALING = 4.0

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": EOS,
    "initializer_range": 0.5,
}
ROPE: dict[str, Any] = {
    **COMMON,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": CONTEXT,
}
WINDOW: dict[str, Any] = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}

FAMILIES: dict[str, Callable[[dict[str, Any]], PreTrainedModel]] = {
    "qwen3": lambda more: Qwen3ForCausalLM(Qwen3Config(**{**ROPE, "tie_word_embeddings": True, **more})),
    "llama": lambda more: LlamaForCausalLM(LlamaConfig(**{**ROPE, "tie_word_embeddings": False, **more})),
    "gpt2": lambda more: GPT2LMHeadModel(
        GPT2Config(**{**COMMON, "n_positions": CONTEXT, "n_embd": 16, "n_layer": 2, "n_head": 2, **more})
    ),
    "gemma2": lambda more: Gemma2ForCausalLM(
        Gemma2Config(**{**ROPE, **WINDOW, "query_pre_attn_scalar": 8, "final_logit_softcapping": SOFTCAP, **more})
    ),
    "gemma3": lambda more: Gemma3ForCausalLM(
        Gemma3TextConfig(**{**ROPE, **WINDOW, "query_pre_attn_scalar": 8, **more})
    ),
    "granite": lambda more: GraniteForCausalLM(
        GraniteConfig(**{**ROPE, "logits_scaling": LOGITS_SCALING, "residual_multiplier": 0.5, **more})
    ),
}
"""Untied: llama, granite; the others are tied. Soft-cap: gemma2. Scale: granite. Sliding window: gemma2, gemma3."""


def char_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character of ``CHARACTERS``, after ``<pad>`` and ``<eos>``; decoding joins them without spaces."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast: Callable[..., PreTrainedTokenizerFast] = PreTrainedTokenizerFast
    return fast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left")


def build(family: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random float32 model in evaluation mode; ``overrides`` go into its configuration."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = FAMILIES[family](overrides)
    model.train(False)
    return model


def save(folder: Path, family: str, seed: int = 0, **overrides: Any) -> str:
    """Write a model and the character tokenizer into ``folder``, and return its path."""
    build(family, seed, **overrides).save_pretrained(folder)
    char_tokenizer().save_pretrained(folder)
    return str(folder)


def random_prompts(lengths: list[int], seed: int = 0) -> list[list[int]]:
    """Prompts of the given lengths, of random characters."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
