"""Null where nothing may be null: YAML has it easily, and the parser lets it through."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any, get_args, get_type_hints

from jsonargparse import Namespace


def nulls(cls: Any, values: Any, name: str) -> Iterator[str]:
    """Dotted names of options that are null although the class's own annotations do not allow it.

    Args:
        cls: The class that ``values`` are the arguments of.
        values: Parsed options, nested.
        name: What they are called together.
    """
    try:
        hints = get_type_hints(inspect.getattr_static(cls, "__init__"))
    except NameError:  # annotations that only its author's type checker can resolve
        return
    parameters = inspect.signature(cls).parameters
    for key, value in vars(values).items():
        hint = hints.get(key)
        if hint is None or key not in parameters:
            continue
        if value is None and parameters[key].default is not None and not _takes_null(hint):
            yield f"{name}.{key}"
        yield from _inside(hint, value, f"{name}.{key}")


def _inside(hint: Any, value: Any, name: str) -> Iterator[str]:
    if isinstance(value, list):
        for entry in value:
            yield from _inside(None, entry, name)
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _inside(None, entry, f"{name}.{key}")
    elif isinstance(value, Namespace) and "class_path" in value:
        if isinstance(options := value.get("init_args"), Namespace):
            module, _, cls = value.class_path.rpartition(".")
            found = getattr(import_module(module), cls)
            if isinstance(found, type):
                yield from nulls(found, options, name)
    elif isinstance(value, Namespace) and isinstance(hint, type):
        yield from nulls(hint, value, name)


def _takes_null(hint: Any) -> bool:
    return hint is Any or hint is object or type(None) in get_args(hint)
