"""Docstrings on the site: roles such as ``:class:`` become code, doctests become blocks of code."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`~?([^`]+)`")
CODE_FOLLOWS = re.compile(r"::$", re.MULTILINE)
DOCTEST = re.compile(r"^( *)>>> .*(?:\n\1\S.*)*", re.MULTILINE)


def for_the_site(text: str) -> str:
    """A docstring as Markdown."""
    text = CODE_FOLLOWS.sub(":", text)
    text = ROLE.sub(lambda role: f"`{role[1].rpartition('.')[2]}`", text)
    return DOCTEST.sub(lambda block: f"{block[1]}```pycon\n{block[0]}\n{block[1]}```", text)


class Docstrings(griffe.Extension):
    """Rewrites every docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = for_the_site(obj.docstring.value)
