"""One console for everything that a run prints, and quiet libraries."""

from __future__ import annotations

import logging
import os
import warnings
from functools import cache

from rich.console import Console

NOISE = (
    r".*does not have many workers.*",
    r".*LeafSpec.*",
    r".*module\(s\) in eval mode at the start of training.*",
    r".*Checkpoint directory .* exists and is not empty.*",
    r".*GPU available but not used.*",
    r".*`ModelCheckpoint.*",
    r".*Trainer already configured with model summary.*",
    r".*dataloader_iter.*",
    r".*lr_scheduler\.step\(\).*",
    r".*barrier\(\): using the device.*",
    r".*assuming the intent is to load in a single process.*",
)
"""Library warnings that say nothing about a run of ours."""


@cache
def console() -> Console:
    """The console of this process: standard error, so that standard output stays for results."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def quiet_libraries() -> None:
    """Silence progress bars, tips and telemetry of the libraries. Call before they are imported."""
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for message in NOISE:
        warnings.filterwarnings("ignore", message=message)
    for name in ("lightning.pytorch", "lightning.fabric", "alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch.loggers.mlflow").setLevel(logging.ERROR)


class _ConsoleHandler(logging.Handler):
    """Log lines through the console, so that they stand above a live table; information from the first rank only."""

    def emit(self, record: logging.LogRecord) -> None:
        first = int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))) == 0
        if first or record.levelno >= logging.WARNING:
            prefix = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
            console().print(f"{prefix}{record.getMessage()}", markup=False)


def set_up_logging(quiet: bool = False) -> None:
    """Print the package's log lines to the console: all of them, or warnings only."""
    logger = logging.getLogger("lit_rlvr")
    callbacks = logging.getLogger("lit_rlvr_callbacks")
    handler = _ConsoleHandler()
    for each in (logger, callbacks):
        each.handlers, each.propagate = [handler], False
        each.setLevel(logging.WARNING if quiet else logging.INFO)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
