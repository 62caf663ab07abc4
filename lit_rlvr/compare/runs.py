"""One run of a comparison: its arguments, its folder, and whether it is done."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from lit_rlvr import __version__
from lit_rlvr.compare.measures import REPORT
from lit_rlvr.compare.spec import Comparison, Layer

LOG, STATE = "log.txt", "run.json"
TAIL = 12
"""Lines of a failed run's log that are shown."""


@dataclass(frozen=True)
class Run:
    """A ``lit-rlvr fit`` of one arm with one seed.

    Args:
        arm: Its name.
        seed: Its seed.
        folder: ``ARM-HASH/seed_N`` in the comparison's folder. The hash is about the arm's arguments and the content of
            its configuration files, so that an edited arm is another folder and is run again.
        arguments: Of ``lit-rlvr fit``, without the logger.
    """

    arm: str
    seed: int
    folder: Path
    arguments: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.arm} seed {self.seed}"

    @property
    def log(self) -> Path:
        """What the run has printed."""
        return self.folder / LOG

    def command(self, program: Sequence[str], logger: dict[str, Any] | None = None) -> list[str]:
        """The whole command; metrics go to a CSV file in the run's folder, and to ``logger``."""
        place = {"save_dir": str(self.folder), "name": "", "version": "metrics"}
        table = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": place}
        loggers = [table] if logger is None else [logger, table]
        return [*program, *self.arguments, f"--trainer.logger={json.dumps(loggers)}"]

    def state(self) -> Literal["done", "failed", "new"]:
        """Done: ended well, with a report. New: never begun, or not ended."""
        code = self._read().get("code")
        if code is None:
            return "new"
        return "done" if code == 0 and (self.folder / REPORT).is_file() else "failed"

    @property
    def code(self) -> int | None:
        """How its process ended; negative: the signal that ended it. None: not yet."""
        code: int | None = self._read().get("code")
        return code

    def begin(self) -> None:
        """Make an empty folder; what an earlier attempt left is deleted."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self._write({"arm": self.arm, "seed": self.seed, "arguments": self.arguments})

    def end(self, code: int, seconds: float) -> None:
        """Write down how its process ended, and after which time."""
        self._write({**self._read(), "code": code, "seconds": round(seconds, 1)})

    def last_lines(self) -> list[str]:
        """The end of its log."""
        if not self.log.exists():
            return []
        return self.log.read_text(encoding="utf-8", errors="replace").rstrip().splitlines()[-TAIL:]

    def _read(self) -> dict[str, Any]:
        try:
            state: dict[str, Any] = json.loads((self.folder / STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError):  # never begun, or stopped while writing
            return {}
        return state

    def _write(self, state: dict[str, Any]) -> None:
        (self.folder / STATE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")


def runs_of(comparison: Comparison) -> list[Run]:
    """All runs, seed by seed, so that an arm that cannot work shows early."""
    arms = {name: arm_arguments(comparison, layer) for name, layer in comparison.arms.items()}
    folders = {
        name: comparison.folder / f"{name}-{fingerprint(arms[name], (comparison.common, layer))}"
        for name, layer in comparison.arms.items()
    }
    runs = []
    for seed in comparison.seeds:
        for name in arms:
            folder = folders[name] / f"seed_{seed}"
            own = (f"--seed_everything={seed}", f"--model.seed={seed}", f"--trainer.default_root_dir={folder}")
            runs.append(Run(name, seed, folder, (*arms[name], *own)))
    return runs


def arm_arguments(comparison: Comparison, layer: Layer) -> tuple[str, ...]:
    """Arguments of an arm: the common files, options and callbacks, then its own."""
    return (*comparison.common.arguments(), *layer.arguments(), f"--threads={comparison.threads}")


def fingerprint(arguments: Sequence[str], layers: Sequence[Layer]) -> str:
    """A hash of arguments, of what the configuration files say (not how), and of this package's version."""
    files = [[str(file), yaml.safe_load(file.read_text(encoding="utf-8"))] for layer in layers for file in layer.config]
    facts = json.dumps([__version__, list(arguments), files], sort_keys=True, default=str)
    return hashlib.sha256(facts.encode()).hexdigest()[:8]
