"""What the command line says of an exception that ends a command."""

from __future__ import annotations

import traceback

from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf.errors import OmegaConfBaseException

from lit_rlvr.blame import PluginError, frames_of_user, place, raised_here
from lit_rlvr.cli_names import interpolation

SPEAKING = (ValueError, ArithmeticError, RuntimeError, OSError, ImportError, MisconfigurationException)
"""Kinds of exceptions whose message says what is wrong; another one without a user's code in it is our mistake."""


def sentence_about(error: Exception, keys: list[str]) -> str | None:
    """What to print of ``error``: a sentence, and the lines of the user's own code that it went through.

    Args:
        error: What ended the command.
        keys: Every option of the command, dotted.

    Returns:
        The text; None for an error of this package or a library's, whose traceback is wanted.
    """
    if isinstance(error, OmegaConfBaseException):
        return interpolation(error, keys)
    said: BaseException = error
    while said.__cause__ is not None and str(said).startswith("Does not validate against any of the Union"):
        said = said.__cause__  # the sentence of a constructor, which jsonargparse wraps
    frames = frames_of_user(said)
    if not frames:
        return str(said) if isinstance(said, SPEAKING) else None
    if isinstance(said, PluginError) or (isinstance(said, SPEAKING) and raised_here(said)):
        sentence = str(said)
    else:
        sentence = f"{frames[-1].name} raised {type(said).__name__} at {place(frames[-1])}: {said}"
    return f"{sentence}\n{''.join(traceback.format_list(frames))}LIT_RLVR_DEBUG=1 shows the whole traceback"
