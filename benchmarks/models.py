"""Benchmark models with random weights, written to a local folder that every side loads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM


@dataclass(frozen=True)
class Size:
    """A Qwen3 architecture and the work of one step on it.

    Args:
        vocabulary: Tokens.
        hidden: Width.
        layers: Decoder layers.
        feed_forward: Width of the feed-forward part.
        heads: Query heads.
        key_heads: Key-value heads.
        head_size: Width of a head.
        prompts: Prompts per step.
        responses: Responses per prompt.
        prompt_tokens: Length of every prompt.
        new_tokens: Length of every response.
    """

    vocabulary: int
    hidden: int
    layers: int
    feed_forward: int
    heads: int
    key_heads: int
    head_size: int
    prompts: int
    responses: int
    prompt_tokens: int
    new_tokens: int

    @property
    def body(self) -> int:
        """Parameters in matrix products outside of the head."""
        attention = self.hidden * self.head_size * (2 * self.heads + 2 * self.key_heads)
        return self.layers * (attention + 3 * self.hidden * self.feed_forward)

    @property
    def head(self) -> int:
        """Parameters of the head, which the embedding shares."""
        return self.vocabulary * self.hidden


SIZES = {
    "S": Size(512, 192, 6, 576, 6, 3, 32, prompts=8, responses=8, prompt_tokens=32, new_tokens=64),
    "M": Size(49_152, 512, 12, 1536, 8, 4, 64, prompts=4, responses=8, prompt_tokens=32, new_tokens=64),
    "0.6B": Size(151_936, 1024, 28, 3072, 16, 8, 128, prompts=16, responses=8, prompt_tokens=128, new_tokens=512),
    "1.7B": Size(151_936, 2048, 28, 6144, 16, 8, 128, prompts=16, responses=8, prompt_tokens=128, new_tokens=512),
}
"""S and M for a CPU; the others for a GPU."""


def write(size: Size, folder: Path, ends: int = 0) -> Path:
    """Write model and tokenizer into ``folder``.

    The tokenizer's end token lies outside of the model's vocabulary, so that no response ends before its limit.

    Args:
        size: The architecture.
        folder: Where to.
        ends: Tokens of the vocabulary that end a response all the same, for responses of geometric lengths.
    """
    torch.manual_seed(0)
    config: Any = Qwen3Config(
        vocab_size=size.vocabulary, hidden_size=size.hidden, intermediate_size=size.feed_forward,
        num_hidden_layers=size.layers, num_attention_heads=size.heads, num_key_value_heads=size.key_heads,
        head_dim=size.head_size, tie_word_embeddings=True, max_position_embeddings=32_768,
        pad_token_id=0, bos_token_id=None, eos_token_id=size.vocabulary,
    )  # fmt: skip
    model: Any = Qwen3ForCausalLM(config)
    model.generation_config.eos_token_id = [size.vocabulary, *range(1, 1 + ends)]
    model.save_pretrained(folder)
    names = {f"t{i}": i for i in range(size.vocabulary)} | {"<eos>": size.vocabulary}
    words = Tokenizer(models.WordLevel(names, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="t0", eos_token="<eos>", padding_side="left"
    ).save_pretrained(folder)
    return folder


def questions(size: Size, count: int) -> list[str]:
    """Prompts of equal length, of random tokens."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, size.vocabulary, (count, size.prompt_tokens), generator=generator)
    return [" ".join(f"t{i}" for i in row) for row in ids.tolist()]
