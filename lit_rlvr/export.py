"""``lit-rlvr export``: a Hugging Face folder from a checkpoint, whole or in shards, on one process."""

from __future__ import annotations

import argparse
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

POLICY = "policy.hf."
METADATA = "meta.pt"
"""What Lightning calls the file with everything but tensors, in a folder of shards."""


def main(arguments: list[str]) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="lit-rlvr export",
        description="Write the policy of a checkpoint as a Hugging Face folder; adapters are merged into it.",
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", type=Path, help="a checkpoint: one file, or a folder of shards")
    parser.add_argument("out", type=Path, help="the folder to write")
    parser.add_argument("--model", help="where the model that was trained lies, if it has moved since")
    given = parser.parse_args(arguments)
    from lit_rlvr.terminal import console, quiet_libraries

    quiet_libraries()
    try:
        export(given.checkpoint, given.out, given.model)
    except (ValueError, OSError) as error:
        console().print(f"lit-rlvr: error: {error}", markup=False)
        return 2
    print(given.out)
    return 0


def export(checkpoint: Path, out: Path, model: str | None = None) -> None:
    """Write the policy in ``checkpoint`` to ``out``, with the tokenizer of the model that it was trained from.

    Args:
        checkpoint: A file, or a folder of shards.
        out: The folder to write.
        model: The model's folder or name, if it is not where it was.

    Raises:
        ValueError: When ``checkpoint`` is none, or does not say what model it is of.
    """
    from transformers import AutoTokenizer

    from lit_rlvr.lora import LoRA, merged_weights
    from lit_rlvr.models import resolve_model, save_model
    from lit_rlvr.policy import load_policy

    weights, source = read(checkpoint)
    if model is None and "model" not in source:
        raise ValueError(f"{checkpoint} does not say what model it was trained from; give --model")
    path = resolve_model(model or source["model"])
    dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    lora = LoRA(**source["lora"]) if source.get("lora") else None
    trained = load_policy(path, dtype, lora=lora, empty=True).hf
    if missing := sorted({name for name, _ in trained.named_parameters()} - weights.keys()):
        raise ValueError(f"{checkpoint} is of another model than {path}: it has no {missing[0]}")
    if lora is not None:
        weights, trained = merged_weights(trained, weights), load_policy(path, dtype, empty=True).hf
    save_model(trained, AutoTokenizer.from_pretrained(path), out, weights)


def read(checkpoint: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The policy's weights, by their names in the Hugging Face model, and where it came from.

    Raises:
        ValueError: When ``checkpoint`` is none.
    """
    if not checkpoint.exists():
        raise ValueError(f"there is no checkpoint {checkpoint}")
    if (checkpoint / METADATA).is_file():
        everything = torch.load(checkpoint / METADATA, weights_only=True)
        weights = read_shards(checkpoint)
    elif zipfile.is_zipfile(checkpoint):
        everything = torch.load(checkpoint, mmap=True, map_location="cpu", weights_only=True)
        weights = everything.get("state_dict", {})
    elif checkpoint.is_dir():
        raise ValueError(f"{checkpoint} is a folder, but holds no shards of a checkpoint")
    else:
        raise ValueError(f"{checkpoint} is no checkpoint of a run, or is cut short")
    weights = {name.removeprefix(POLICY): value for name, value in weights.items() if name.startswith(POLICY)}
    if not weights:
        raise ValueError(f"{checkpoint} holds no policy")
    return weights, everything.get("policy", {})


def read_shards(folder: Path) -> dict[str, Tensor]:
    """The model's tensors, put together from shards; the optimizer's are left on the disk."""
    stored = FileSystemReader(folder).read_metadata().state_dict_metadata
    tensors: dict[str, Tensor] = {}
    for name, about in stored.items():
        if name.split(".")[0] == "state_dict" and isinstance(about, TensorStorageMetadata):
            tensors[name] = torch.empty(about.size, dtype=about.properties.dtype)
    load(dict(tensors), checkpoint_id=folder, no_dist=True)
    return {name.split(".", 1)[1]: value for name, value in tensors.items()}
