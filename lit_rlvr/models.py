"""Where models come from: a Hugging Face folder or name, a GGUF file, or a tiny one built on the spot."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from tokenizers import Regex, Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from lit_rlvr.lora import ADAPTER
from lit_rlvr.near import nearest
from lit_rlvr.tasks.last_digit import ALPHABET

BUILTIN = "builtin:"
GGUF = "gguf:"
TINY = "tiny-qwen3-75k"
PAD, END, UNKNOWN = "<pad>", "<eos>", "<unk>"


def cache_folder() -> Path:
    """Where built and warm-started models are kept: ``$LIT_RLVR_CACHE``, or ``~/.cache/lit-rlvr``."""
    return Path(os.environ.get("LIT_RLVR_CACHE") or Path.home() / ".cache" / "lit-rlvr")


def resolve_model(source: str) -> str:
    """A folder or name that transformers opens; built-in models are made, and GGUF files converted, on first use.

    Raises:
        ValueError: For an unknown built-in model, or a GGUF file that cannot be read.
    """
    if source.startswith(GGUF):
        from lit_rlvr.gguf import converted

        with torch.device("cpu"):
            return converted(source)
    if not source.startswith(BUILTIN):
        return _existing(source)
    name = source.removeprefix(BUILTIN)
    if name != TINY:
        raise ValueError(f"there is no built-in model {name!r}; the only one is {BUILTIN}{TINY}")
    folder = cache_folder() / TINY
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / "model.safetensors").exists():
            save_model(tiny_qwen3(), character_tokenizer(ALPHABET), folder)
    return str(folder)


def _existing(source: str) -> str:
    """``source``, unless it is clearly a path and there is no such folder.

    Raises:
        ValueError: When the folder does not exist, or is no model folder.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists() and not (path / ADAPTER).exists():
            raise ValueError(f"{source} is no model folder: it has no config.json")
        return str(path)
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = nearest(path.name, beside)
        hint = f"; did you mean {path.parent / near}?" if near else ""
        raise ValueError(f"there is no model folder {source}{hint}")
    return source


def save_model(model: Any, tokenizer: Any, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
    """Write a Hugging Face folder, the weights last, so that a folder with weights is whole.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        folder: Where to.
        weights: The state dict to write, if the model does not hold it itself.
    """
    if weights is not None:  # copies do not show any more which of them are tied
        own = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
        weights = {name: value for name, value in weights.items() if name in own}
    tokenizer.save_pretrained(folder)
    # In a process group, transformers leaves writing to the first rank; here the holder of the cache's lock writes.
    model.should_save_on_this_rank = lambda is_main_process: True
    model.save_pretrained(folder, state_dict=weights)


def character_tokenizer(alphabet: str) -> PreTrainedTokenizerFast:
    """One token per character of ``alphabet``, beside padding, end and unknown."""
    vocabulary = {token: i for i, token in enumerate([PAD, END, UNKNOWN, *alphabet])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, unk_token=UNKNOWN)


def tiny_qwen3(seed: int = 0) -> Qwen3ForCausalLM:
    """A Qwen3 with 75,520 random parameters, for the tasks that a laptop learns."""
    config = Qwen3Config(
        vocab_size=len(ALPHABET) + 3, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4}, initializer_range=0.05,
        max_position_embeddings=128, pad_token_id=0, eos_token_id=1, bos_token_id=None, dtype="float32",
    )  # fmt: skip
    # The same numbers whatever a strategy makes models on, and in.
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Qwen3ForCausalLM = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        return model
