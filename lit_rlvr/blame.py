"""Errors in code that was plugged in: whose, in which method, and at which line."""

from __future__ import annotations

import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import FrameSummary

LIBRARIES = ("site-packages", "dist-packages", "lit_rlvr_callbacks")
"""Folders whose files are nobody's own; so are Python's, and this package's."""
OWN = (str(Path(__file__).parent), sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), "<")


class PluginError(ValueError):
    """What a plugged-in class raised, in a sentence that says where; the error itself is its ``__cause__``."""


@contextmanager
def blame(author: object, method: str, name: str | None = None) -> Iterator[None]:
    """Say of an error inside that ``author`` raised it in ``method``, and at which line.

    Args:
        author: What is called: a callback, a loss, an advantage.
        method: The method that is called.
        name: What the author goes by, where that is not its class.

    Raises:
        PluginError: For any exception; the message names the author, the method and the author's line.
    """
    try:
        yield
    except PluginError:
        raise  # of something that the author called
    except Exception as error:
        cls = type(author)
        who = cls.__name__ if name in (None, cls.__name__) else f"{name} ({cls.__name__})"
        raise PluginError(f"{who}.{method} raised {_told(error, cls.__module__)}") from error


def frames_of_user(error: BaseException) -> list[FrameSummary]:
    """The frames of an error, or of the one that it was raised from, that are neither a library's nor this package's.

    The outermost comes first.
    """
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    return next((own for cause in reversed(causes) if (own := [f for f in _frames(cause) if _of_user(f)])), [])


def raised_here(error: BaseException) -> bool:
    """Whether this package raised an error, rather than a library or a user's code."""
    return _frames(error)[-1].filename.startswith(OWN[0])


def place(frame: FrameSummary) -> str:
    """File and line of a frame, the file as seen from the current folder."""
    path = Path(frame.filename)
    shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    return f"{shown}:{frame.lineno}"


def _told(error: Exception, module: str) -> str:
    """The kind of an error, where a class of ``module`` raised it, and its message."""
    frames = frames_of_user(error) or [f for f in _frames(error) if Path(f.filename).stem == module.rpartition(".")[2]]
    where = f" at {place(frames[-1])}" if frames else ""
    return f"{type(error).__name__}{where}: {error}" if str(error) else f"{type(error).__name__}{where}"


def _frames(error: BaseException) -> list[FrameSummary]:
    return list(traceback.extract_tb(error.__traceback__))


def _of_user(frame: FrameSummary) -> bool:
    return not frame.filename.startswith(OWN) and not set(LIBRARIES) & set(Path(frame.filename).parts)
