"""Whether the Hugging Face hub answers, asked once: its libraries would ask again for half a minute, and say so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SECONDS = 5.0
"""As long as an answer may take."""


def hub_answers() -> bool:
    """Whether the hub is within reach; offline mode counts as out of reach."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=SECONDS)
    except Exception:  # the network's own kinds
        return False
    return True


@contextmanager
def cache_alone() -> Iterator[None]:
    """Datasets and models come from the caches of this machine, or not at all, without a word to the hub."""
    import datasets.config  # the libraries read the environment once, when they are imported
    from huggingface_hub import constants

    switches: list[tuple[Any, str]] = [(constants, "HF_HUB_OFFLINE")]
    switches += [(datasets.config, name) for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")]
    before = [getattr(module, name) for module, name in switches]
    for module, name in switches:
        setattr(module, name, True)
    try:
        yield
    finally:
        for (module, name), value in zip(switches, before, strict=True):
            setattr(module, name, value)
