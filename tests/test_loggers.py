"""Loggers other than MLflow: what they are told, and what is said where their package is missing."""

from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import yaml
from command_line import CONFIGS, SMALL, cli, succeed
from jsonargparse import Namespace
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger

from lit_rlvr.loggers import COLUMNS, check_packages, log_rollouts, log_settings, others
from lit_rlvr.tracking import MLflow

ROWS: list[dict[str, Any]] = [
    {"question": "1+1?", "response": "2", "answer": "2", "reward": 1.0, "correct": True, "tokens": ["2"]},
    {"question": "1+2?", "response": "a\nb", "answer": None, "reward": 0.0, "correct": False, "tokens": []},
]


def bare(cls: type, **attributes: Any) -> Any:
    """A logger of a kind whose package is not needed to make it."""
    made = type(cls.__name__, (cls,), {"experiment": Mock(), **attributes})
    return made.__new__(made)


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_rlvr.loggers.find_spec", lambda name: None)


@pytest.mark.usefixtures("nothing_installed")
@pytest.mark.parametrize(("name", "package"), [("WandbLogger", "wandb"), ("TensorBoardLogger", "tensorboard")])
@pytest.mark.parametrize("wrapped", [Namespace, dict])
@pytest.mark.parametrize("several", [False, True])
def test_a_missing_package_is_named(name: str, package: str, wrapped: Any, several: bool) -> None:
    entry = wrapped(class_path=f"lightning.pytorch.loggers.{name}", init_args={})
    told = f"^trainer.logger: {name} needs the package {package}: pip install {package}$"
    with pytest.raises(ValueError, match=told):
        check_packages([entry] if several else entry)


@pytest.mark.usefixtures("nothing_installed")
@pytest.mark.parametrize("given", [None, True, False, {"class_path": "lightning.pytorch.loggers.CSVLogger"}])
def test_nothing_is_missing_for_others(given: Any) -> None:
    check_packages(given)


def test_one_of_two_packages_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_rlvr.loggers.find_spec", lambda name: name == "tensorboardX" or None)
    check_packages({"class_path": "TensorBoardLogger"})


def test_others_are_told_on_the_first_rank_alone(tmp_path: Path) -> None:
    first, mlflow = CSVLogger(tmp_path), bare(MLflow)
    trainer: Any = SimpleNamespace(loggers=[mlflow, first], is_global_zero=True)
    assert others(trainer, MLflow) == [first]
    trainer.is_global_zero = False
    assert others(trainer, MLflow) == []


def test_settings_reach_a_csv_logger(tmp_path: Path) -> None:
    """Twice, as settings and facts of a run do: neither replaces the other."""
    logger = CSVLogger(tmp_path, name=None, version="")
    log_settings([logger], {"model.seed": 3, "trainer.callbacks.0.class_path": "EntropyTopK"})
    log_settings([logger], {"run.credit": "EntropyTopK"})
    logger.save()
    assert yaml.safe_load((tmp_path / "hparams.yaml").read_text()) == {
        "model.seed": 3, "trainer.callbacks.0.class_path": "EntropyTopK", "run.credit": "EntropyTopK"
    }  # fmt: skip


def test_rollouts_are_text_where_texts_are_shown(tmp_path: Path) -> None:
    tables: list[Any] = []
    wandb = bare(WandbLogger, log_table=lambda self, key, **what: tables.append((key, what)))
    board = bare(TensorBoardLogger)
    log_rollouts([wandb, board, CSVLogger(tmp_path)], ROWS, 7)
    cells = [["1+1?", "2", "2", 1.0, True], ["1+2?", "a\nb", None, 0.0, False]]
    assert tables == [("rollouts", {"columns": list(COLUMNS), "data": cells, "step": 7})]
    ((name, text, step),) = [call.args for call in board.experiment.add_text.call_args_list]
    assert (name, step) == ("rollouts", 7)
    assert text.splitlines()[2:] == ["| 1+1? | 2 | 2 | 1.0 | True |", "| 1+2? | a<br>b | None | 0.0 | False |"]


def test_a_fragment_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_rlvr.loggers.find_spec", lambda name: None)
    outcome = cli(tmp_path, "fit", *SMALL, "--config", str(CONFIGS / "logger/wandb.yaml"))
    assert (outcome.code, outcome.err) == (
        2, "lit-rlvr: error: trainer.logger: WandbLogger needs the package wandb: pip install wandb\n"
    )  # fmt: skip


def test_a_run_with_csv(tmp_path: Path) -> None:
    """Metrics step by step, the whole configuration and the facts of the run; no MLflow database."""
    options = ("--config", str(CONFIGS / "logger/csv.yaml"), "--trainer.max_steps=2", "--trainer.val_check_interval=2")
    succeed(tmp_path, "fit", *SMALL, *options)
    folder = tmp_path / "runs/quickstart/metrics/version_0"
    settings = yaml.safe_load((folder / "hparams.yaml").read_text())
    assert settings["model.batch.prompts"] == 4
    assert settings["trainer.callbacks.1.class_path"] == "lit_rlvr_callbacks.EntropyTopK"
    assert settings["run.credit"] == "StageDetector → EntropyTopK"
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert [row["step"] for row in rows if row["train/loss"]] == ["1", "2"]
    assert not (tmp_path / "mlflow.db").exists()
