"""Hints for words that are nearly right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


def nearest(word: str, known: Iterable[str], least: float = 0.6) -> str | None:
    """The known word that is most like ``word``, if one is like it at all: by ``least``, between 0 and 1.

    >>> nearest("roh", ["rho", "select"]), nearest("gamma", ["rho", "select"])
    ('rho', None)
    >>> nearest("adamw", ["Adam", "AdamW"])
    'AdamW'
    """
    names = {name.lower(): name for name in known}
    return next((names[near] for near in difflib.get_close_matches(word.lower(), names, 1, least)), None)


def either(names: Sequence[str]) -> str:
    """A list in words.

    >>> either(["a"]), either(["a", "b", "c"])
    ('a', 'a, b or c')
    """
    *most, last = names
    return f"{', '.join(most)} or {last}" if most else last


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a sentence that names what is near ``word``, or nothing.

    >>> did_you_mean("anwser", ["question", "answer"])
    '; did you mean answer?'
    """
    near = nearest(word, known)
    return "" if near is None else f"; did you mean {near}?"
