"""Whether the Hugging Face hub answers, asked once: its libraries would ask again for half a minute, and say so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

SECONDS = 5.0
"""As long as an answer may take."""


def hub_answers() -> bool:
    """Whether the hub is within reach; offline mode counts as out of reach."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

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
    import datasets.config  # reads the setting once, when it is imported

    with (
        patch("huggingface_hub.constants.HF_HUB_OFFLINE", True),
        patch.object(datasets.config, "HF_HUB_OFFLINE", True),
        patch.object(datasets.config, "HF_DATASETS_OFFLINE", True),
    ):
        yield
