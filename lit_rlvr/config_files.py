"""Configuration files: what is wrong with one, and how its texts are read."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from jsonargparse import ArgumentParser, get_loader, set_loader
from jsonargparse._typehints import ActionTypeHint
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from lit_rlvr.near import did_you_mean

MODE = "omegaconf+"
"""The parser's mode: YAML, with ``${...}`` filled in once everything is read."""

STANDARD = "tag:yaml.org,2002:"
TEXT = f"{STANDARD}str"
BESIDE_CLASS = ("class_path", "init_args", "dict_kwargs")
ENTRY = "a class's name, or {class_path: NAME, init_args: {...}}"


@cache
def keep_comments_as_text() -> None:
    """Read the text ``# Role`` as itself, where the parser would read an empty YAML document with a comment: null."""
    ArgumentParser(parser_mode=MODE).parse_string("{}")  # the parser makes this mode's loader on first use
    load = get_loader(MODE)

    def read(text: str) -> Any:
        value = load(text)
        return text if value is None and text.lstrip().startswith("#") else value

    set_loader(MODE, read, (yaml.YAMLError,))


@cache
def replace_whole_lists() -> None:
    """Let a list, and a mapping of names, take the place of the one before it.

    The parser would give their entries what it had read before for an entry of the same class in the same place: the
    ``EntropyTopK`` of a later file would keep the ``select`` of an earlier one.
    """
    check = ActionTypeHint._check_type

    def check_alone(self: Any, value: Any, append: bool = False, cfg: Any = None, mode: str | None = None) -> Any:
        text = value.lstrip() if isinstance(value, str) else ""
        is_list = isinstance(value, list) or text.startswith("[")
        of_names = any(get_origin(kind) is dict for kind in get_args(self._typehint))
        whole = is_list or (of_names and (isinstance(value, dict) or text.startswith("{")))
        return check(self, value, append, None if whole and not append else cfg, mode)

    ActionTypeHint._check_type = check_alone  # type: ignore[method-assign]


def check_file(path: str, options: Collection[str]) -> None:
    """Refuse a configuration file that the parser would read as something else than was meant, or not at all.

    Args:
        path: The file, which exists.
        options: Every option of the command, dotted.

    Raises:
        ValueError: Naming the file and, where there is one, the line.
    """
    root = _composed(path)
    if root is None:
        raise ValueError(f"{path} is empty: it has no options")
    if not isinstance(root, MappingNode):
        raise ValueError(f"{path} must hold sections such as `model:`, got {_shown(root)}")
    groups = {option[:i] for option in options for i, letter in enumerate(option) if letter == "."}
    for problem in _problems(root, "", groups, Path(path).parent):
        raise ValueError(f"{path}, line {problem}")


def check_yaml(path: str) -> None:
    """Refuse a YAML file with broken syntax, or in which a name stands twice.

    Raises:
        ValueError: Naming the file and the line.
    """
    if (root := _composed(path)) is not None:
        for problem in _problems(root, "", set(), Path()):
            raise ValueError(f"{path}, line {problem}")


def _composed(path: str) -> Node | None:
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    try:
        root: Node | None = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        raise ValueError(f"{path} is not valid YAML{_near(error, text)}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {str(error).splitlines()[0]}") from error
    return root


def _near(error: yaml.MarkedYAMLError, text: str) -> str:
    if error.problem_mark is None:
        return f": {error.problem}"
    line = error.problem_mark.line
    written = (text.splitlines() or [""])[min(line, len(text.splitlines()) - 1)]
    if written[: len(written) - len(written.lstrip())].count("\t"):
        return f", line {line + 1}: it begins with a tab; indent with spaces"
    return f", near line {line + 1}: {error.problem}"


def _problems(node: Node, name: str, groups: set[str], folder: Path) -> Iterator[str]:
    """What is wrong in ``node``, the value of the option ``name``, each beginning with its line."""
    if isinstance(node, MappingNode):
        keys = [key.value for key, _ in node.value if isinstance(key, ScalarNode)]
        yield from _about_keys(node, name, keys)
        for key, value in node.value:
            if isinstance(key, ScalarNode):
                yield from _problems(value, f"{name}.{key.value}" if name else key.value, groups, folder)
    elif name in groups and not (isinstance(node, ScalarNode) and os.path.isfile(folder / node.value)):
        known = sorted(group for group in groups if group.startswith(f"{name}."))
        example = f" ({', '.join(known)})" if known else ""
        hint = "; is a colon missing?" if isinstance(node, ScalarNode) and " " in node.value else ""
        where = f"{node.start_mark.line + 1}: {name} is a section{example}"
        yield f"{where}; its options stand below it, got {_shown(node)}{hint}"
    elif node.tag.startswith((f"{STANDARD}python", "!")):
        tag = node.tag.replace(STANDARD, "!!")
        yield f"{node.start_mark.line + 1}: {name} has the tag {tag}, which is not understood"
    elif isinstance(node, SequenceNode):
        for entry in node.value:
            if isinstance(entry, MappingNode) and name.rstrip("+") == "trainer.callbacks":
                yield from _about_entry(entry, name)
            yield from _problems(entry, name, set(), folder)


def _about_keys(node: MappingNode, name: str, keys: list[str]) -> Iterator[str]:
    """Keys that stand twice, and keys beside ``class_path`` that would be dropped or misread."""
    for i, (key, value) in enumerate(node.value):
        line = key.start_mark.line + 1
        if not isinstance(key, ScalarNode) or (key.tag != TEXT and key.value != "<<"):
            yield f"{line}: a name must be a text, got {_shown(key)}; put it in quotes"
            continue
        if key.value in keys[:i] and key.value != "<<":
            yield f"{line}: {f'{name}.' if name else ''}{key.value} stands there a second time; join the two"
        if "class_path" in keys and key.value not in BESIDE_CLASS:
            hint = did_you_mean(key.value, BESIDE_CLASS[1:]) or "; the class's own options go below init_args"
            yield f"{line}: beside {name}.class_path stands {key.value!r}{hint}"
        if key.value == "class_path" and not (isinstance(value, ScalarNode) and value.tag == TEXT):
            yield f"{line}: {name}.class_path must be the name of a class, got {_shown(value)}"


def _about_entry(entry: MappingNode, name: str) -> Iterator[str]:
    keys = [key.value for key, _ in entry.value]
    if "class_path" not in keys:
        yield f"{entry.start_mark.line + 1}: an entry of {name} is {ENTRY}; this one has {', '.join(map(str, keys))}"


def _shown(node: Node) -> str:
    if isinstance(node, SequenceNode):
        return "a list"
    if isinstance(node, MappingNode):
        return "options"
    return "nothing" if not node.value else repr(node.value[:40])
