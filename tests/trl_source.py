"""Single functions out of TRL's source files, without the 10 seconds that importing its trainer takes."""

from __future__ import annotations

import ast
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch


@lru_cache
def trl_function(file: str, name: str, **names: Any) -> Any:
    """Compile the function or method ``name`` of trl's ``file``; ``names`` are the globals it needs beside torch."""
    spec = find_spec("trl")
    if spec is None or spec.origin is None:
        pytest.skip("trl is not installed")
    tree = ast.parse((Path(spec.origin).parent / file).read_text(encoding="utf-8"))
    found = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name]
    assert len(found) == 1, f"trl's {file} holds {len(found)} definitions of {name}"
    namespace: dict[str, Any] = {"torch": torch, **names}
    exec(compile(ast.Module(body=[found[0]], type_ignores=[]), file, "exec"), namespace)  # noqa: S102 - source of an installed package
    return namespace[name]
