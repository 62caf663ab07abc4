"""What is compared: the YAML file of a comparison, checked before anything runs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from lit_rlvr.cli_errors import missing_file
from lit_rlvr.compare.measures import Measure, read_measure
from lit_rlvr.config_files import check_yaml
from lit_rlvr.near import did_you_mean

LAYER = ("config", "set", "callbacks", "callbacks+")
OURS = ("seed_everything", "model.seed", "threads", "trainer.default_root_dir", "trainer.logger", "config")
"""Options of ``fit`` that the comparison sets itself."""


@dataclass(frozen=True)
class Layer:
    """Files and options of ``lit-rlvr fit``, in this order.

    Args:
        config: Configuration files.
        set: Options by dotted name; values as on the command line.
        callbacks: Replaces the list of callbacks; None: leaves it.
        more_callbacks: Added to the list of callbacks; ``callbacks+`` in YAML.
    """

    config: tuple[Path, ...] = ()
    set: Mapping[str, Any] = field(default_factory=dict)
    callbacks: tuple[Any, ...] | None = None
    more_callbacks: tuple[Any, ...] = ()

    def arguments(self) -> list[str]:
        """As words of a command line."""
        words = [word for file in self.config for word in ("--config", str(file))]
        words += [f"--{name}={_text(value)}" for name, value in self.set.items()]
        words += [] if self.callbacks is None else [f"--trainer.callbacks={_text(list(self.callbacks))}"]
        return words + [f"--trainer.callbacks+={_text(entry)}" for entry in self.more_callbacks]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


DEFAULT = Measure("held_out", "sampled/mean_at_1", better="higher")


@dataclass(frozen=True)
class Comparison:
    """Arms, seeds, and what is looked at.

    Args:
        name: Names the parent run in MLflow; by default the file's name.
        arms: What differs from ``common``, by the arm's name.
        baseline: The arm that the others are compared with.
        folder: Where runs and tables are kept; by default ``runs/compare/`` and the name.
        common: What all arms share.
        seeds: Seeds of every arm; runs with the same seed make a pair.
        metric: The measure that is looked at first.
        also: More measures.
        curves: Metrics that are plotted over optimiser steps.
        confidence: Of the intervals.
        threads: Threads of a run.
        workers: Runs at the same time; None: as many as the machine has cores for.
        track: Log to MLflow.
        tracking_uri: MLflow's address; None: ``$MLFLOW_TRACKING_URI``, or ``sqlite:///mlflow.db``.
        experiment: MLflow's experiment.

    Raises:
        ValueError: When something is missing or out of range.
    """

    name: str
    arms: Mapping[str, Layer]
    baseline: str
    folder: Path
    common: Layer = Layer()
    seeds: tuple[int, ...] = (0, 1, 2)
    metric: Measure = DEFAULT
    also: tuple[Measure, ...] = ()
    curves: tuple[str, ...] = ("rollout/reward",)
    confidence: float = 0.95
    threads: int = 1
    workers: int | None = None
    track: bool = True
    tracking_uri: str | None = None
    experiment: str = "lit-rlvr"

    def __post_init__(self) -> None:
        _known(self.baseline, self.arms, "baseline")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds) or any(seed < 0 for seed in self.seeds):
            raise ValueError(f"seeds must be different whole numbers of at least 0, got {list(self.seeds)}")
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence must lie in (0, 1), got {self.confidence}")
        if self.threads < 1 or (self.workers is not None and self.workers < 1):
            raise ValueError(f"threads and workers must be at least 1, got {self.threads} and {self.workers}")
        names = [measure.name for measure in self.measures]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"{twice.pop()} is listed twice among metric and also")

    @property
    def measures(self) -> tuple[Measure, ...]:
        """All measures, the first one first."""
        return (self.metric, *self.also)

    def only(self, arms: Iterable[str] | None, seeds: Iterable[int] | None) -> Comparison:
        """The same with some of the arms and seeds.

        Raises:
            ValueError: For an unknown arm, or without the baseline.
        """
        wanted = list(self.arms if arms is None else arms)
        for name in wanted:
            _known(name, self.arms, "arms")
        if self.baseline not in wanted:
            raise ValueError(f"the baseline {self.baseline!r} must be among the arms")
        kept = {name: layer for name, layer in self.arms.items() if name in wanted}
        return replace(self, arms=kept, seeds=self.seeds if seeds is None else tuple(seeds))


def read(file: Path) -> Comparison:
    """Read a comparison. Configuration files are looked for beside ``file``, then in the current folder.

    Raises:
        ValueError: When the file is missing, is no YAML, or says something that is not understood.
    """
    if not file.is_file():
        raise ValueError(missing_file(file))
    check_yaml(str(file))
    given = yaml.safe_load(file.read_text(encoding="utf-8-sig"))
    if not isinstance(given, dict) or not isinstance(given.get("arms"), dict):
        raise ValueError(f"{file} is no comparison: it needs `arms`, a mapping of names to what differs")
    options = dict(OPTIONS)
    _only_known(given, [*LAYER, "arms", "metric", "also", *options], str(file))
    if not isinstance(given.get("baseline"), str):
        raise ValueError(f"{file} needs `baseline`, the name of the arm that the others are compared with")
    kept = {name: _typed(name, given[name], kind) for name, kind in options.items() if name in given}
    name = kept.setdefault("name", file.stem)
    kept["folder"] = Path(kept.get("folder", f"runs/compare/{name}"))
    if "metric" in given:
        kept["metric"] = read_measure(given["metric"], "metric")
    if not isinstance(given.get("also", []), list):
        raise ValueError("also must be a list of measures")
    kept["also"] = tuple(read_measure(entry, f"also[{i}]") for i, entry in enumerate(given.get("also", [])))
    common = _layer({key: given[key] for key in LAYER if key in given}, file, str(file))
    arms = {_arm_name(name): _layer(layer or {}, file, f"arm {name}") for name, layer in given["arms"].items()}
    return Comparison(arms=arms, common=common, **kept)


OPTIONS: dict[str, Any] = {
    "name": str, "baseline": str, "folder": str, "seeds": (int,), "curves": (str,), "confidence": float,
    "threads": int, "workers": int | None, "track": bool, "tracking_uri": str | None, "experiment": str,
}  # fmt: skip
"""Type of each plain option; a tuple stands for a list."""


def _typed(name: str, value: Any, kind: Any) -> Any:
    if isinstance(kind, tuple):
        if not isinstance(value, list):
            raise ValueError(f"{name} must be a list, got {value!r}")
        return tuple(_typed(name, entry, kind[0]) for entry in value)
    accepted = kind | int if kind is float else kind
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        words = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}
        raise ValueError(f"{name} must be {words.get(kind, f'{kind}'.replace('None', 'null'))}, got {value!r}")
    return value


def _layer(given: Any, file: Path, where: str) -> Layer:
    if not isinstance(given, dict):
        raise ValueError(f"{where} must be a mapping with some of {', '.join(LAYER)}, got {given!r}")
    _only_known(given, LAYER, where)
    for key in ("config", "callbacks", "callbacks+"):
        if not isinstance(given.get(key, []), list):
            raise ValueError(f"{where}: {key} must be a list, got {given[key]!r}")
    options = given.get("set", {})
    if not isinstance(options, dict):
        raise ValueError(f"{where}: set must map options of `lit-rlvr fit` to values, got {options!r}")
    for name in options:
        _check_option(name, where)
    callbacks = given.get("callbacks")
    return Layer(
        tuple(_find(str(name), file) for name in given.get("config", [])),
        options,
        None if callbacks is None else tuple(callbacks),
        tuple(given.get("callbacks+", [])),
    )


def _check_option(name: Any, where: str) -> None:
    plain = str(name).rstrip("+")
    if plain == "trainer.callbacks":
        raise ValueError(f"{where}: list callbacks under `callbacks` or `callbacks+`, not under `set`")
    for ours in OURS:
        if plain == ours or plain.startswith(f"{ours}."):
            raise ValueError(f"{where}: {name} is set by the comparison itself, for each run")


def _find(name: str, file: Path) -> Path:
    beside = file.parent / name
    found = beside if beside.is_file() else Path(name)
    if not found.is_file():
        raise ValueError(f"{file}: {missing_file(beside)}")
    return found


def _arm_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
        raise ValueError(f"an arm's name becomes a folder: letters, digits and ._- only, got {name!r}")
    return name


def _known(name: str, known: Iterable[str], where: str) -> None:
    if name not in known:
        raise ValueError(f"{where}: there is no arm {name!r}{did_you_mean(name, known)}")


def _only_known(given: Mapping[Any, Any], known: Iterable[str], where: str) -> None:
    for key in given:
        if key not in known:
            raise ValueError(f"{where} has no option {key!r}{did_you_mean(str(key), known)}")
