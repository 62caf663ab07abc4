"""Where the user's files are: paths that start at the YAML file that names them, and hints for what is not there."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse.typing import register_type

from lit_rlvr.near import did_you_mean

if TYPE_CHECKING:
    Place = str
else:

    class Place(str):
        """A path, with whatever follows a colon; in Python code any text will do.

        In YAML a relative path starts at the folder of the YAML file or, where nothing is there, at the current folder.
        """

        __slots__ = ()


def find(value: Any) -> Place:
    """The place that YAML or the command line names; jsonargparse calls it from within the YAML file's folder."""
    if not isinstance(value, str):
        raise ValueError(f"expected a text, got {value!r}")
    path, colon, rest = value.partition(":")
    return Place(os.path.abspath(path) + colon + rest if path and os.path.isfile(path) else value)


register_type(Place, str, find)


def existing_file(path: str, suffixes: Iterable[str] = ()) -> Path:
    """The file at ``path``.

    Raises:
        ValueError: When there is none, with near names in its folder; else its files with one of ``suffixes``.
    """
    file = Path(path)
    if file.is_file():
        return file
    folder = file.absolute().parent
    if not folder.is_dir():
        raise ValueError(f"there is no file {path}: the folder {folder} does not exist")
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
    hint = did_you_mean(file.name, names)
    if not hint and (some := [name for name in names if name.endswith(tuple(suffixes))][:5]):
        hint = f"; there are {', '.join(some)}"
    raise ValueError(f"there is no file {file.name} in {folder}{hint}")
