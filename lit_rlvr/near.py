"""Hints for words that are nearly right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that is most like ``word``, if one is like it at all.

    >>> nearest("roh", ["rho", "select"]), nearest("gamma", ["rho", "select"])
    ('rho', None)
    """
    return next(iter(difflib.get_close_matches(word, list(known), n=1)), None)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a sentence that names what is near ``word``, or nothing.

    >>> did_you_mean("anwser", ["question", "answer"])
    '; did you mean answer?'
    """
    near = nearest(word, known)
    return "" if near is None else f"; did you mean {near}?"
