"""The names a configuration may use, and sentences about references to names that are not there."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lit_rlvr.foreign_names import algorithm_here, option_here
from lit_rlvr.near import did_you_mean, either, nearest

SLIP = 0.9
"""How alike two options are that differ by a slip of the pen."""
MOST = 12
"""As many names stand in a sentence."""


def near_option(option: str, keys: list[str]) -> str:
    """The end of a sentence about an unknown ``option``: its last part is compared within its group, then all of it."""
    if (here := option_here(option)) and nearest(option, keys, SLIP) is None:
        return here
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


def near_class(name: str, option: str, classes: Mapping[str, list[str]]) -> str:
    """The end of a sentence about an unknown class ``name``: what is near it, or what there is.

    Args:
        name: What the user wrote.
        option: Where.
        classes: The names that each option takes.
    """
    known = classes.get(option) or sorted({n for names in classes.values() for n in names})
    same = [cls for cls in known if cls.lower() == name.lower()]
    if not same and (algorithm := algorithm_here(name)):
        return algorithm
    if near := did_you_mean(name, same or known):
        return near
    if len(name) > 2 and (within := [cls for cls in known if name.lower() in cls.lower()]):
        return f"; did you mean {either(within[:MOST])}?"
    listed = (
        f"there are {', '.join(known)}, "
        if option in classes and len(known) <= MOST
        else "name a built-in class, as lit-rlvr fit --help lists them, "
    )
    return f"; {listed}or a class_path like my_module.MyClass"


def _without_command(name: str) -> str:
    head, _, rest = name.partition(".")
    return rest if head in ("fit", "validate", "test", "warmup", "explain", "doctor") and rest else name


def option_keys(parser: Any) -> list[str]:
    """Every option of a parser, dotted."""
    return sorted({action.dest for action in parser._actions if action.dest and not action.dest.endswith(".help")})
