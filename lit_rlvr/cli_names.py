"""The names a configuration may use, and sentences about references to names that are not there."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from typing import Any

from lit_rlvr.near import did_you_mean, nearest


def near_option(option: str, keys: list[str]) -> str:
    """The end of a sentence about an unknown ``option``: its last part is compared within its group, then all of it."""
    group, _, last = option.rpartition(".")
    siblings = [k.rpartition(".")[2] for k in keys if k.rpartition(".")[0] == group]
    if near := nearest(last, siblings):
        return f"; did you mean {group + '.' if group else ''}{near}?"
    ends = {key.rpartition(".")[2]: key for key in keys}
    if last.replace("-", "_") in ends:
        return f"; did you mean {ends[last.replace('-', '_')]}?"
    return did_you_mean(option, keys)


def interpolation(error: Exception, keys: list[str]) -> str:
    """OmegaConf's complaint about a ``${...}`` as a sentence."""
    text = str(error)
    if environment := re.search(r"Environment variable '([^']+)' not found", text):
        name = environment.group(1)
        return f"${{oc.env:{name}}}: there is no environment variable {name}; a default goes behind a comma"
    if broken := re.search(r"(?:no viable alternative|mismatched|missing|extraneous) .* at '(.*)'|input '(.*)'", text):
        return f"{broken.group(1) or broken.group(2)!r} is no whole reference; write ${{section.option}}"
    missing = re.search(r"Interpolation key '([^']+)' not found(?: \(resolved to '([^']+)'\))?", text)
    where = re.search(r"full_key: (\S+)", text)
    if not missing:
        return text.splitlines()[0]
    name = _without_command(missing.group(2) or missing.group(1))
    place = _without_command(where.group(1)) if where else "the configuration"
    return f"{place}: ${{{name}}} stands for nothing{near_option(name, keys)}"


def _without_command(name: str) -> str:
    head, _, rest = name.partition(".")
    return rest if head in ("fit", "validate", "test", "warmup", "explain", "doctor") and rest else name


def option_keys(parser: Any) -> list[str]:
    """Every option of a parser, dotted."""
    return sorted({action.dest for action in parser._actions if action.dest and not action.dest.endswith(".help")})


def class_names(bases: Iterable[type]) -> list[str]:
    """Short names of all imported subclasses of ``bases``."""
    names: set[str] = set()
    todo: list[Any] = list(bases)
    while todo:
        cls = todo.pop()
        todo += [c for c in cls.__subclasses__() if c.__name__ not in names]
        if not cls.__name__.startswith("_") and not inspect.isabstract(cls):
            names.add(cls.__name__)
    return sorted(names)
