"""Turns the parser's messages into one clear sentence, with "did you mean" where a name is nearly right."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

LONGEST = 12
"""Most lines of an error."""


def did_you_mean(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """``; did you mean X?`` for the nearest known word, or nothing.

    >>> did_you_mean("roh", ["rho", "select"])
    '; did you mean rho?'
    """
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return f"; did you mean {near[0]}?" if near else ""


def clear(message: str, keys: list[str], classes: list[str]) -> str:
    """The parser's ``message`` as a sentence.

    Args:
        message: What jsonargparse says.
        keys: Every option of the command, dotted.
        classes: Every class that YAML may name.
    """
    for rule in (
        _missing,
        _yaml,
        _command,
        _option,
        _own_words,
        _class_option,
        _choice,
        _schedule,
        _class,
        _type,
        _file,
    ):
        if sentence := rule(message, keys, classes):
            return sentence
    lines = [line for line in message.splitlines() if line.strip() and "Subtypes:" not in line]
    return "\n".join(lines[:LONGEST])


def _key(message: str) -> str:
    found = re.search(r'Parser key "([^"]+)"', message)
    return found.group(1) if found else "the configuration"


def _missing(message: str, keys: list[str], classes: list[str]) -> str | None:
    found = re.search(r"following arguments are required: (.+)", message)
    if not found:
        return None
    names = [name.split(".", 1)[-1] for name in found.group(1).split(", ")]
    verb = "is" if len(names) == 1 else "are"
    return f"{' and '.join(names)} {verb} required and not set; begin with --config configs/quickstart.yaml"


def _yaml(message: str, keys: list[str], classes: list[str]) -> str | None:
    if "Problems parsing config" not in message:
        return None
    where = re.search(r"line (\d+), column (\d+)", message)
    what = message.split(":", 1)[1].strip().splitlines()[0]
    return f"a configuration file is not valid YAML{f' near line {where.group(1)}' if where else ''}: {what}"


def _command(message: str, keys: list[str], classes: list[str]) -> str | None:
    found = re.search(r"invalid choice: '([^']+)' \(choose from (.+)\)", message)
    if not found or "subcommand" not in message:
        return None
    commands = [*re.findall(r"[\w-]+", found.group(2)), "compare"]  # which is not a command of the parser
    return (
        f"there is no command {found.group(1)!r}{did_you_mean(found.group(1), commands)} (lit-rlvr --help lists them)"
    )


def _option(message: str, keys: list[str], classes: list[str]) -> str | None:
    found = re.search(r"does not accept option '([^']+)'|unrecognized arguments: -+([\w.]+)", message)
    if not found:
        return None
    option = found.group(1) or found.group(2)
    return f"there is no option {option!r}{_near_option(option, keys)}"


def _near_option(option: str, keys: list[str]) -> str:
    """Compare last parts within the same group first, then whole names."""
    group, _, last = option.rpartition(".")
    siblings = [k.rpartition(".")[2] for k in keys if k.rpartition(".")[0] == group]
    if near := difflib.get_close_matches(last, siblings, n=1):
        return f"; did you mean {group + '.' if group else ''}{near[0]}?"
    return did_you_mean(option, keys)


def _own_words(message: str, keys: list[str], classes: list[str]) -> str | None:
    """A sentence of this package, wrapped by the parser: raised while it built an object to validate it."""
    found = re.search(
        r"Problem with given class_path '[^']+':\s+([A-Za-z][\w.]* (?:must|needs|with|acts|has|cannot).*)", message
    )
    if not found or "Parser key" in found.group(1):
        return None
    return found.group(1).strip()


def _class_option(message: str, keys: list[str], classes: list[str]) -> str | None:
    found = re.findall(r"Problem with given class_path '([^']+)':\s+Option '([^']+)' is not accepted", message)
    for path, option in found:
        if path.rpartition(".")[2] == "Callback" and len(found) > 1:
            continue  # the base class is tried after the class that was meant
        module, _, name = path.rpartition(".")
        known = [p for p in inspect.signature(getattr(import_module(module), name)).parameters if p != "self"]
        hint = did_you_mean(option.split(".")[0], known) or f"; it has {', '.join(known)}"
        return f"{_key(message)}: {name} has no option {option!r}{hint}"
    return None


def _choice(message: str, keys: list[str], classes: list[str]) -> str | None:
    found = re.search(r"Expected a typing\.Literal\[(.+?)\]\. Got value: (.+)", message)
    if not found:
        return None
    choices = re.findall(r"'([^']+)'", found.group(1))
    inner = re.findall(r'Parser key "([^"]+)"', message)
    name = ".".join(dict.fromkeys(inner))
    hint = did_you_mean(found.group(2), choices)
    return f"{name} must be one of {', '.join(choices)}, got {found.group(2)!r}{hint}"


def _schedule(message: str, keys: list[str], classes: list[str]) -> str | None:
    found = re.search(r"Expected a dot import path string: (\S+)", message)
    if not found or "[<class 'lit_rlvr.schedule.Schedule'>, <class 'float'>" not in message:
        return None
    names = dict.fromkeys(re.findall(r'Parser key "([^"]+)"', message))
    return f"{'.'.join(names)} must be a number or a schedule, got {found.group(1)!r}"


def _class(message: str, keys: list[str], classes: list[str]) -> str | None:
    key = _key(message)
    if found := re.search(r"Expected a dot import path string: (\S+)", message):
        name = found.group(1)
        hint = did_you_mean(name, classes) or "; name a built-in class, or a class_path like my_module.MyClass"
        return f"{key}: there is no class {name!r}{hint}"
    if found := re.search(r"module '([^']+)' has no attribute '([^']+)'", message):
        module, name = found.groups()
        return f"{key}: {module} has no {name!r}{did_you_mean(name, dir(import_module(module)))}"
    if found := re.search(r"class_path '([^']+)':\s+No module named '([^']+)'", message):
        path, module = found.groups()
        return f"{key}: cannot import {path}: there is no module {module!r} in this folder or on PYTHONPATH"
    return None


def _type(message: str, keys: list[str], classes: list[str]) -> str | None:
    found = re.findall(
        r'Parser key "([^"]+)":\s+Expected an? (?:<class \'(\w+)\'>|(\w[\w.\[\], |]*?))\. Got value: (.+)', message
    )
    if not found:
        return None
    names = [name for name, *_ in re.findall(r'Parser key "([^"]+)"()', message)]
    _, kind, other, value = found[-1]
    words = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a text"}
    return f"{'.'.join(dict.fromkeys(names))} must be {words.get(kind or other, kind or other)}, got {value.strip()!r}"


def _file(message: str, keys: list[str], classes: list[str]) -> str | None:
    if not (
        found := re.search(r"(?:File does not exist|not accessible|does not exist): '?([^'\n]+?)'?$", message, re.M)
    ):
        return None
    return missing_file(Path(found.group(1)))


def missing_file(path: Path) -> str:
    """A sentence about a file that is not there, with the nearest name in its folder."""
    beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    shown = path.name if path.parent == Path.cwd() else str(path)
    return f"there is no file {shown!r}{did_you_mean(path.name, beside)}"


RULES = (
    _missing, _yaml, _command, _option, _own_words, _class_option, _choice, _schedule, _class, _type, _file
)  # fmt: skip
"""What is tried on a message, in order; the first rule that has a sentence wins."""


def interpolation(error: Exception, keys: list[str]) -> str:
    """OmegaConf's complaint about a ``${...}`` as a sentence."""
    text = str(error)
    missing = re.search(r"Interpolation key '([^']+)' not found(?: \(resolved to '([^']+)'\))?", text)
    where = re.search(r"full_key: (\S+)", text)
    if not missing:
        return text.splitlines()[0]
    name = _without_command(missing.group(2) or missing.group(1))
    place = _without_command(where.group(1)) if where else "the configuration"
    return f"{place}: ${{{name}}} stands for nothing{_near_option(name, keys)}"


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
