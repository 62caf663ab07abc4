"""Turns the parser's messages into one clear sentence, with "did you mean" where a name is nearly right."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path

from lit_rlvr.cli_names import MOST, near_class, near_option
from lit_rlvr.config_files import ENTRY
from lit_rlvr.foreign_names import COMMANDS, algorithm_here
from lit_rlvr.near import did_you_mean, either

Names = Mapping[str, list[str]]
"""The classes that YAML may name, by the option that takes them."""
LONGEST = 12
"""Most lines of an error."""


CHATTER = re.compile(
    r"^\s*(?:- a (?:class path|dict) .*|Subclass types expect one of:|- Expected a path but .*)\n?", re.MULTILINE
)
"""Lines of the parser's that tell a user nothing."""
TENSOR = re.compile(r"(Subtypes: \[<class 'float'>), <class 'torch\.Tensor'>(\]\n.*\n.*\n)\s*- Expected a dot .*\n")
"""Learning rates may be tensors, which nobody writes into a file."""
BASE = re.compile(r"(Problem with given class_path [\s\S]*?)^ *- Problem with .* 'lightning\.Callback':\n.*\n", re.M)
"""The base class of callbacks, which is tried after the class that was meant."""
WORDS = {
    "int": "a whole number", "float": "a number", "bool": "true or false", "str": "a text", "NoneType": "null",
    "list": "a list", "tuple": "a list", "dict": "options by name", "collections.abc.Mapping": "options by name",
}  # fmt: skip


def clear(message: str, keys: list[str], classes: Names) -> str:
    """The parser's ``message`` as a sentence.

    Args:
        message: What jsonargparse says.
        keys: Every option of the command, dotted.
        classes: Every class that YAML may name, by the option that takes it.
    """
    message = BASE.sub(r"\1", TENSOR.sub(r"\1\2", CHATTER.sub("", message)))
    for rule in RULES:
        if sentence := rule(message, keys, classes):
            return sentence
    lines = [line for line in message.splitlines() if line.strip() and "Subtypes:" not in line]
    return "\n".join(lines[:LONGEST])


def _key(message: str) -> str:
    found = re.search(r'Parser key "([^"]+)"', message)
    return found.group(1) if found else "the configuration"


def _path(message: str) -> str:
    """The option that ``message`` is about, with those that it is within."""
    return ".".join(dict.fromkeys(re.findall(r'Parser key "([^"]+)"', message))) or "the configuration"


def _missing(message: str, keys: list[str], classes: Names) -> str | None:
    found = re.search(r"following arguments are required: (.+)", message)
    if not found:
        return None
    names = [name.split(".", 1)[-1] for name in found.group(1).split(", ")]
    if owner := re.search(r"Problem with given class_path '([^']+)':\s+[Tt]he following arguments are req", message):
        cls = owner.group(1).rpartition(".")[2]
        kind = cls.removesuffix("Logger").lower()
        by_folder = f", or trainer.default_root_dir with --config configs/logger/{kind}.yaml"
        file = by_folder if kind in ("csv", "tensorboard") else ""
        return f"{_key(message)}: {cls} needs {' and '.join(names)}; set {_key(message)}.{names[0]}{file}"
    verb = "is" if len(names) == 1 else "are"
    return f"{' and '.join(names)} {verb} required and not set; begin with --config configs/quickstart.yaml"


def _yaml(message: str, keys: list[str], classes: Names) -> str | None:
    if "Problems parsing config" not in message:
        return None
    where = re.search(r"line (\d+), column (\d+)", message)
    what = message.split(":", 1)[1].strip().splitlines()[0]
    return f"a configuration file is not valid YAML{f' near line {where.group(1)}' if where else ''}: {what}"


def _command(message: str, keys: list[str], classes: Names) -> str | None:
    found = re.search(r"invalid choice: '([^']+)' \(choose from (.+)\)", message)
    if not found or "subcommand" not in message:
        return None
    if found.group(1) in COMMANDS:
        return f"there is no command {found.group(1)!r}; here it is {COMMANDS[found.group(1)]}"
    commands = [*re.findall(r"[\w-]+", found.group(2)), "compare"]  # which is not a command of the parser
    return (
        f"there is no command {found.group(1)!r}{did_you_mean(found.group(1), commands)} (lit-rlvr --help lists them)"
    )


def _option(message: str, keys: list[str], classes: Names) -> str | None:
    found = re.search(r"does not accept option '([^']+)'|unrecognized arguments: (-*)([^\s=]+)", message)
    if not found:
        return None
    option, dashes = found.group(1) or found.group(3), found.group(2)
    if dashes in ("", "-"):
        hint = did_you_mean(f"--{option}", (f"--{key}" for key in keys)) or "; options begin with --"
        if not dashes and Path(option).is_file():
            return f"{option} is a file; configuration files are named behind --config"
        return f"{dashes}{option} is no option{hint}"
    return f"there is no option {option!r}{near_option(option, keys)}"


def _value(message: str, keys: list[str], classes: Names) -> str | None:
    found = re.search(r"argument (?:-\w/)?(--\S+): expected one argument", message)
    return f"{found.group(1)} needs a value, as in {found.group(1)}=VALUE" if found else None


def _section(message: str, keys: list[str], classes: Names) -> str | None:
    found = re.search(r'Unable to load config [\'"](.*)[\'"]', message)
    if not found:
        return None
    name = _key(message)
    own = [key for key in keys if key.startswith(f"{name}.")]
    option = f"{name}.{name}" if f"{name}.{name}" in own else next(iter(own), f"{name}.OPTION")
    return f"{name} is a section: set its options, as in --{option}=VALUE; got {found.group(1)!r}"


def _own_words(message: str, keys: list[str], classes: Names) -> str | None:
    """A sentence of this package, wrapped by the parser: raised while it built an object to validate it."""
    found = re.search(
        r"Problem with given class_path '[^']+':\s+([A-Za-z][\w.]* (?:must|needs|with|acts|has|cannot).*)", message
    )
    if not found or "Parser key" in found.group(1):
        return None
    return found.group(1).strip()


def _class_option(message: str, keys: list[str], classes: Names) -> str | None:
    found = re.findall(r"Problem with given class_path '([^']+)':\s+Option '([^']+)' is not accepted", message)
    called = r"callable class: Option '([^']+)' is not accepted\. Got value: Namespace\(class_path='([^']+)'"
    found += [(path, option) for option, path in re.findall(called, message)]
    for path, option in found:
        if path.rpartition(".")[2] == "Callback":
            return f"{_key(message)}: {option.split('.')[0]!r} is no option; write {ENTRY}"
        module, _, name = path.rpartition(".")
        known = [p for p in inspect.signature(getattr(import_module(module), name)).parameters if p != "self"]
        hint = did_you_mean(option.split(".")[0], known) or f"; it has {', '.join(known)}"
        return f"{_key(message)}: {name} has no option {option!r}{hint}"
    return None


def _short_task(message: str, keys: list[str], classes: Names) -> str | None:
    name = re.search(r"Expected a dot import path string: (\S+)", message)
    option = re.search(r"Given value: NestedArg\(key='([^']+)'", message)
    if not name or not option or _key(message) != "data.task":
        return None
    return (
        f"data.task.{option.group(1)}: the short name {name.group(1)!r} has no options; name the class instead, as in "
        f"--data.task=ReasoningGym --data.task.{option.group(1)}=VALUE"
    )


def _no_class(message: str, keys: list[str], classes: Names) -> str | None:
    """An option of a class, before there is a class."""
    option, key = re.search(r"Given value: NestedArg\(key='([^']+)'", message), _key(message)
    if not option or key not in classes or "Expected a <class 'NoneType'>" not in message:
        return None
    known = f": {either(classes[key])}" if len(classes[key]) <= MOST else "=CLASS"
    return f"{key} is null, which has no option {option.group(1)!r}; name a class before it with --{key}{known}"


def _settings(message: str, keys: list[str], classes: Names) -> str | None:
    """Something else where a class's options belong, and the class is the only one of its kind."""
    found = re.search(r"Subtypes: \[<class '(lit_rlvr[\w.]*)\.(\w+)'>, <class 'NoneType'>\]", message)
    value = re.findall(r"Given value: (.+)", message)
    simple = re.search(r"Errors:\n\s+- (?:Expected a dot import|Unexpected import path|Not a valid subclass)", message)
    if not found or not simple or not value:
        return None
    cls = getattr(import_module(found.group(1)), found.group(2))
    if cls.__subclasses__() or any(found.group(2) in names for names in classes.values()):
        return None
    options, got = inspect.signature(cls).parameters, _quoted(value[-1])
    number = value[-1] if re.fullmatch(r"-?[\d.]+(e-?\d+)?", value[-1]) else "VALUE"
    whole = all(option.default is not option.empty for option in options.values())
    defaults = ", is {} for their defaults" if whole else ""
    example = f"--{_key(message)}.{next(iter(options))}={number}"
    return f"{_key(message)} has options, as in {example}{defaults}, or is null; got {got}"


def _choice(message: str, keys: list[str], classes: Names) -> str | None:
    found = re.search(r"Expected a typing\.Literal\[(.+?)\]\. Got value: (.+)", message)
    if not found:
        return None
    choices = re.findall(r"'([^']+)'", found.group(1))
    hint = did_you_mean(found.group(2), choices)
    return f"{_path(message)} must be one of {', '.join(choices)}, got {found.group(2)!r}{hint}"


def _schedule(message: str, keys: list[str], classes: Names) -> str | None:
    found = re.search(r"Expected a dot import path string: (\S+)", message)
    if not found or "[<class 'lit_rlvr.schedule.Schedule'>, <class 'float'>" not in message:
        return None
    return f"{_path(message)} must be a number or a schedule, got {found.group(1)!r}"


def _class(message: str, keys: list[str], classes: Names) -> str | None:
    key = _key(message)
    if found := re.search(r'Parser key "[^"]+":\s+(?:- )?Not a valid subclass of (\w+)\. Got value: (.*)', message):
        return f"{_path(message)} must be a class of the kind {found.group(1)}, got {_quoted(found.group(2))}"
    if re.search(r"Expected an import path or a subclass spec, but got None", message):
        return f"{key} cannot be null; leave it out for the default"
    if found := re.search(r"Expected an import path or a subclass spec, but got (.*)", message):
        return f"{key} must be {ENTRY}, got {found.group(1)}"
    if (found := re.search(r"Given value: (\{.*)", message)) and "is abstract" in message:
        return f"{key}: whose options are {found.group(1)}? Write {{class_path: NAME, init_args: {{...}}}}"
    if found := re.search(r"Expected '([^']+)' to be a subclass of <class '([^']+)'>", message):
        return f"{key}: {found.group(1)} is no {found.group(2).rpartition('.')[2]}"
    if found := re.search(r"Expected a dot import path string: (\S+)", message):
        name, key = found.group(1), _path(message[: found.start()])
        if any(name in names for names in classes.values()):
            return f"{key}: {name} is a class of another kind than what goes there"
        return f"{key}: there is no class {name!r}{near_class(name, key, classes)}"
    if found := re.search(r"module '([^']+)' has no attribute '([^']+)'", message):
        module, name = found.groups()
        return f"{key}: {module} has no {name!r}{did_you_mean(name, dir(import_module(module)))}"
    if found := re.search(r"class_path '([^']+)':\s+No module named '([^']+)'", message):
        path, module = found.groups()
        return f"{key}: cannot import {path}: there is no module {module!r} in this folder or on PYTHONPATH"
    return None


def _type(message: str, keys: list[str], classes: Names) -> str | None:
    found = re.findall(
        r'Parser key "([^"]+)":\s+Expected an? (?:<class \'([\w.]+)\'>|(\w[\w.\[\], |]*?))\. Got value: (.*)', message
    )
    if not found:
        return None
    _, kind, other, value = found[-1]
    named: str = kind or other
    expected = WORDS.get(named, named).replace("tuple with", "a list with")
    return f"{_path(message)} must be {expected}, got {_quoted(value)}"


def _quoted(value: str) -> str:
    """A value as a user wrote it, without what the parser made of the options around it."""
    value = value.partition(". Got value: Namespace(")[0].strip()
    return value if value[:1] in ("[", "{") else repr(value)


def _union(message: str, keys: list[str], classes: Names) -> str | None:
    """A value that fits none of several types: what the innermost option takes, in words."""
    found = re.search(
        r"Does not validate against any of the Union subtypes\n(?:\s*Subtypes: .*\n)?\s*Errors:\n"
        r"((?:\s*- (?:Expected an? |Not a valid |argument of ).*\n)+)\s*Given value type: .*\n\s*Given value: (.*)",
        message,
    )
    names = re.findall(r'Parser key "([^"]+)"', message[: found.start()] if found else "")
    if not found or not names:
        return None
    kinds = []
    for expected in found.group(1).splitlines():
        if choices := re.search(r"typing\.Literal\[(.+)\]", expected):
            kinds += [choice.strip("' ") for choice in choices.group(1).split(",")]
        elif subclass := re.search(r"Not a valid subclass of (\w+)", expected):
            kinds.append(f"a class of the kind {subclass.group(1)}")
        elif kind := re.search(r"Expected an? <class '([\w.]+)'>", expected):
            kinds.append(WORDS.get(kind.group(1), kind.group(1)))
    *most, last = dict.fromkeys([kind for kind in kinds if kind != "null"] + ["null"] * ("null" in kinds))
    return f"{'.'.join(dict.fromkeys(names))} must be {either([*most, last])}, got {_quoted(found.group(2))}"


def _file(message: str, keys: list[str], classes: Names) -> str | None:
    if found := re.search(r"Path is not a file: '(.+)'", message):
        return f"{found.group(1)} is a folder, expected a configuration file"
    if found := re.search(r"Not of type \w+: expected (.+), got (.+)", message):
        return f"{_path(message)} must be {found.group(1)}, got {found.group(2)}"
    if not (
        found := re.search(r"(?:File does not exist|not accessible|does not exist): '?([^'\n]+?)'?$", message, re.M)
    ):
        return None
    return missing_file(Path(found.group(1)))


def missing_file(path: Path) -> str:
    """A sentence about a file that is not there, with the nearest name in its folder."""
    beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    shown = path.name if path.parent == Path.cwd() else str(path)
    return f"there is no file {shown!r}{did_you_mean(path.name, beside) or algorithm_here(path.stem)}"


RULES = (
    _missing, _yaml, _command, _option, _value, _section, _own_words, _class_option, _short_task, _settings, _choice,
    _schedule, _no_class, _class, _type, _union, _file,
)  # fmt: skip
"""What is tried on a message, in order; the first rule that has a sentence wins."""
