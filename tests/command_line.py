"""The command line inside the test's process, on a run that takes a second."""

from __future__ import annotations

import io
import logging
import os
import random
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from safetensors.torch import load_file
from torch import Tensor

from lit_rlvr.__main__ import main
from lit_rlvr.tasks import Prompt, Score, Split, Task

CONFIGS = Path(__file__).parents[1] / "configs"
QUICKSTART = ("--config", str(CONFIGS / "quickstart.yaml"))
SMALL = (
    *QUICKSTART, "--data.task=command_line.FewSums", "--warmup=null", "--model.batch.prompts=4",
    "--model.batch.minibatch_prompts=2", "--model.batch.responses=4", "--data.eval_prompts=8",
)  # fmt: skip
TINY = (*SMALL, "--trainer.max_steps=4")
"""The quickstart from random weights: two rollout phases of two optimiser steps."""
UNTRACKED = "--trainer.logger=false"


@dataclass(frozen=True)
class FewSums(Task):
    """Few problems; right is an even number of digits in the response, which random weights give every other time."""

    seed: int = 0
    isolated = False

    def prompts(self, split: Split) -> Sequence[Prompt]:
        first = {"train": 0, "val": 40, "test": 70}[split] + self.seed
        return [Prompt(i, f"{(first + i) // 10}+{(first + i) % 10}?", "even") for i in range(24)]

    def score(self, prompt: Prompt, response: str) -> Score:
        even = sum(character.isdigit() for character in response) % 2 == 0
        return Score(float(even), even, str(even))

    def demonstrate(self, prompt: Prompt, rng: random.Random) -> str:
        return f"#{rng.randrange(10)}"


@dataclass(frozen=True)
class Outcome:
    """How a command ended, what it printed, and which warnings a user would have seen."""

    code: int
    out: str
    err: str
    warned: tuple[str, ...]


class TinyFit(NamedTuple):
    """A finished run: the folder that it ran in, and how it ended."""

    folder: Path
    outcome: Outcome

    @property
    def root(self) -> Path:
        """The trainer's ``default_root_dir``."""
        return self.folder / "runs/quickstart"

    @property
    def database(self) -> str:
        """The address of its MLflow database."""
        return f"sqlite:///{self.folder}/mlflow.db"


@contextmanager
def untouched_process() -> Iterator[None]:
    """Put back what a command changes in its process: log handlers, environment, import path, seeds."""
    names = ("lit_rlvr", "lit_rlvr_callbacks")
    kept = [(log, log.handlers, log.propagate, log.level) for log in map(logging.getLogger, names)]
    state = random.getstate()
    places = patch.object(sys, "argv", sys.argv), patch.object(sys, "path", list(sys.path)), patch.dict(os.environ)
    try:
        with places[0], places[1], places[2], torch.random.fork_rng():
            yield
    finally:
        random.setstate(state)
        for log, handlers, propagate, level in kept:
            log.handlers, log.propagate = handlers, propagate
            log.setLevel(level)


def cli(folder: Path, *arguments: str) -> Outcome:
    """Run ``lit-rlvr`` in ``folder``."""
    out, err = io.StringIO(), io.StringIO()
    with (
        untouched_process(), chdir(folder), redirect_stdout(out), redirect_stderr(err),
        warnings.catch_warnings(record=True) as caught,
    ):  # fmt: skip
        # As in a process of its own, where the first occurrence is shown, and none that is meant for developers.
        warnings.simplefilter("default")
        for kind in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", kind)
        # A command of an earlier test, or the developer's own environment, may have named another database.
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
        try:
            code: Any = main(list(arguments))
        except SystemExit as exit:
            code = exit.code
    return Outcome(code, out.getvalue(), err.getvalue(), tuple(str(warning.message) for warning in caught))


def succeed(folder: Path, *arguments: str) -> Outcome:
    """Run ``lit-rlvr`` in ``folder``, which must end well."""
    outcome = cli(folder, *arguments)
    assert outcome.code == 0, outcome.err
    return outcome


def saved_weights(folder: Path) -> dict[str, Tensor]:
    """The weights of a policy folder."""
    weights: dict[str, Tensor] = load_file(folder / "model.safetensors")
    return weights


def same_weights(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether two sets of weights are equal bit for bit."""
    assert first.keys() == second.keys()
    assert first
    return all(torch.equal(first[name], second[name]) for name in first)
