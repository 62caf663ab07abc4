"""Benchmark models with random weights, written to a local folder that every side loads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging


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
    def rows(self) -> int:
        """Responses per step."""
        return self.prompts * self.responses

    @property
    def body(self) -> int:
        """Parameters in matrix products outside of the head."""
        attention = self.hidden * self.head_size * (2 * self.heads + 2 * self.key_heads)
        return self.layers * (attention + 3 * self.hidden * self.feed_forward)

    @property
    def late(self) -> int:
        """Those of the last layer behind its keys and values: only states that are read have to go through them."""
        return self.hidden * self.head_size * 2 * self.heads + 3 * self.hidden * self.feed_forward

    @property
    def head(self) -> int:
        """Parameters of the head, which the embedding shares."""
        return self.vocabulary * self.hidden


SIZES = {
    "tiny": Size(128, 32, 2, 64, 2, 1, 16, prompts=2, responses=4, prompt_tokens=4, new_tokens=8),
    "S": Size(512, 192, 6, 576, 6, 3, 32, prompts=8, responses=8, prompt_tokens=32, new_tokens=64),
    "M": Size(49_152, 512, 12, 1536, 8, 4, 64, prompts=4, responses=8, prompt_tokens=32, new_tokens=64),
    "wide": Size(151_936, 1024, 2, 3072, 16, 8, 64, prompts=2, responses=8, prompt_tokens=32, new_tokens=64),
    "0.6B": Size(151_936, 1024, 28, 3072, 16, 8, 128, prompts=16, responses=8, prompt_tokens=128, new_tokens=512),
    "1.7B": Size(151_936, 2048, 28, 6144, 16, 8, 128, prompts=16, responses=8, prompt_tokens=128, new_tokens=512),
}
"""tiny for a test of the benchmarks themselves; S and M for a CPU; wide: few layers below a large vocabulary, for the
cost of the head; the others for a GPU."""


def dtype_on(device: str) -> str:
    """Of weights: float32 on a CPU, bfloat16 on a GPU."""
    return "float32" if device == "cpu" else "bfloat16"


def configuration(size: Size) -> Any:
    """The architecture; its end token lies outside of the vocabulary, so that no response ends before its limit."""
    return Qwen3Config(
        vocab_size=size.vocabulary, hidden_size=size.hidden, intermediate_size=size.feed_forward,
        num_hidden_layers=size.layers, num_attention_heads=size.heads, num_key_value_heads=size.key_heads,
        head_dim=size.head_size, tie_word_embeddings=True, max_position_embeddings=32_768,
        pad_token_id=0, bos_token_id=None, eos_token_id=size.vocabulary,
    )  # fmt: skip


def write(size: Size, folder: Path, ends: int = 0, device: str = "cpu") -> Path:
    """Write model and tokenizer into ``folder``.

    Args:
        size: The architecture.
        folder: Where to.
        ends: Tokens of the vocabulary that end a response all the same, for responses of geometric lengths.
        device: Where it is to be measured; the weights are in the dtype in which they are loaded there.
    """
    logging.disable_progress_bar()
    torch.manual_seed(0)
    model: Any = Qwen3ForCausalLM(configuration(size)).to(getattr(torch, dtype_on(device)))
    model.generation_config.eos_token_id = [size.vocabulary, *range(1, 1 + ends)]
    model.save_pretrained(folder)
    names = {f"t{i}": i for i in range(size.vocabulary)} | {"<eos>": size.vocabulary}
    words = Tokenizer(models.WordLevel(names, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="t0", eos_token="<eos>", padding_side="left"
    ).save_pretrained(folder)
    return folder


def prompt_ids(size: Size, count: int) -> list[list[int]]:
    """Prompts of equal length, of random tokens."""
    generator = torch.Generator().manual_seed(1)
    ids: list[list[int]] = torch.randint(1, size.vocabulary, (count, size.prompt_tokens), generator=generator).tolist()
    return ids


def questions(size: Size, count: int) -> list[str]:
    """The same prompts as text."""
    return [" ".join(f"t{i}" for i in row) for row in prompt_ids(size, count)]


def responses(size: Size, number: int, ends: int = 0) -> list[list[int]]:
    """Random responses of step ``number``, the same for every side: where training is measured without sampling.

    Args:
        size: How many, and the longest.
        number: Of the step.
        ends: Tokens that end a response, as in :func:`write`; none: all are of the longest length.
    """
    generator = torch.Generator().manual_seed(1000 + number)
    shape = (size.rows, size.new_tokens)
    ids = torch.randint(1 + ends, size.vocabulary, shape, generator=generator)
    if ends:
        ids[torch.rand(shape, generator=generator) < ends / size.vocabulary] = 1
    rows = []
    for row in ids.tolist():
        end = row.index(1) + 1 if ends and 1 in row else len(row)
        rows.append(row[:end])
    return rows
