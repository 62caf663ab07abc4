"""``--help``: this package's words about options that Lightning describes for every use there is."""

from __future__ import annotations

from functools import cache
from typing import Any

from jsonargparse._typehints import ActionTypeHint

from lit_rlvr.cli_classes import HIDDEN

TEXTS = {
    "config": "Configuration file; several are layered, and options on the command line come last.",
    "seed_everything": "Seed of Python, NumPy and torch. model.seed is that of rollouts and random choices.",
    "trainer.accelerator": "cpu, cuda, mps or auto.",
    "trainer.strategy": "How a model is spread over devices: auto, ddp, or a class as in configs/strategy/.",
    "trainer.devices": "Devices of each node: a number, a list of their indices, -1 for all, or auto.",
    "trainer.num_nodes": "Nodes.",
    "trainer.logger": "Where metrics go: a class as in configs/logger/, a list of several, or false.",
    "trainer.callbacks": "Callbacks in order: credit callbacks, which decide what learns, and Lightning's own. "
    "trainer.callbacks+ adds to the list so far.",
    "trainer.max_steps": "Optimiser steps of the run; -1: no end.",
    "trainer.limit_train_batches": "Optimiser steps of an epoch, or their share; null: all.",
    "trainer.limit_val_batches": "Batches of an evaluation, or their share; null: all, 0: no evaluation.",
    "trainer.val_check_interval": "Optimiser steps between two evaluations.",
    "trainer.log_every_n_steps": "Optimiser steps between two entries in the log.",
    "trainer.enable_checkpointing": "Whether checkpoints are written; null: yes.",
    "trainer.accumulate_grad_batches": "Must be 1: one training step is one optimiser step (see model.batch).",
    "trainer.gradient_clip_val": "Largest norm of the gradient; null: not clipped.",
    "trainer.default_root_dir": "Folder of the run: checkpoints, policy, report, rollouts; null: the current one.",
}
"""By option, in place of Lightning's."""


def improve(parser: Any) -> None:
    """Put ``TEXTS`` into a parser."""
    for action in parser._actions:
        if action.dest in TEXTS and not action.option_strings[-1].endswith(".help"):
            action.help = TEXTS[action.dest]


@cache
def hide_bases() -> None:
    """Leave classes that are bases of others out of the lists of choices."""
    listed = ActionTypeHint.extra_help

    def without_bases(self: Any) -> str:
        before, mark, names = listed(self).partition("known subclasses: ")
        kept = [name for name in names.split(", ") if name.rpartition(".")[2] not in HIDDEN]
        return f"{before}{mark}{', '.join(kept)}"

    ActionTypeHint.extra_help = without_bases  # type: ignore[method-assign]
