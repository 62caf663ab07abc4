"""The closing table, ``report.json`` and where the results of a run lie."""

from __future__ import annotations

import io
import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from command_line import TINY, UNTRACKED, Outcome, TinyFit, succeed
from mlflow import MlflowClient
from rich.console import Console
from rich.table import Table

from lit_rlvr.report import Report, closing_table, places
from lit_rlvr.saving import SavePolicy

ONE = {"sampled/mean_at_1": 0.25, "sampled/length": 9.5, "sampled/truncated": 0.125, "sampled/entropy": 0.5}
FOUR = {
    "many/mean_at_4": 0.5, "many/pass_at_1": 0.5, "many/pass_at_4": 0.75, "many/maj_at_4": 0.625, "many/length": 8.0,
    "many/truncated": 0.0, "many/entropy": 0.25,
}  # fmt: skip


def columns(table: Table) -> dict[str, list[str]]:
    """A table as heading: cells."""
    return {str(column.header): [str(cell) for cell in column.cells] for column in table.columns}


def test_columns_of_one_evaluation() -> None:
    """Accuracy, then entropy, length and share of truncated responses, row by row."""
    rows = {"base": ONE, "after RLVR": {**ONE, "sampled/mean_at_1": 0.98765}}
    assert list(columns(closing_table(rows)).items()) == [
        ("policy", ["base", "after RLVR"]),
        ("sampled\nmean@1", ["0.250", "0.988"]),
        ("sampled\nentropy", ["0.500", "0.500"]),
        ("sampled\nlength", ["9.500", "9.500"]),
        ("sampled\ntruncated", ["0.125", "0.125"]),
    ]


def test_columns_of_two_evaluations() -> None:
    """Means and majorities, then pass@k (pass@1 is the mean); facts of the first evaluation alone."""
    table = columns(closing_table({"before": {**FOUR, **ONE}, "after": {**FOUR, **ONE}}))
    assert list(table) == [
        "policy", "many\nmean@4", "many\nmaj@4", "sampled\nmean@1", "many\npass@4", "many\nentropy", "many\nlength",
        "many\ntruncated",
    ]  # fmt: skip
    assert table["many\nmaj@4"] == ["0.625", "0.625"]


def test_a_metric_that_a_policy_lacks_is_a_dash() -> None:
    """An engine that does not measure entropy leaves it out."""
    bare = {name: value for name, value in ONE.items() if name != "sampled/entropy"}
    table = columns(closing_table({"before": ONE, "after": bare}))
    assert table["sampled\nentropy"] == ["0.500", "–"]


def test_headings_fit_into_eighty_characters() -> None:
    """Two evaluations, one of them of several samples, as in a log file: nothing is cut off."""
    console = Console(file=io.StringIO(), record=True, width=80)
    console.print(closing_table({"after warm start": {**FOUR, **ONE}}))
    text = console.export_text()
    assert "…" not in text
    assert {"mean@4", "maj@4", "mean@1", "pass@4", "truncated"} <= set(text.replace("┃", " ").split())


class Evaluator:
    """Counts how often it is asked."""

    def __init__(self, latest_step: int) -> None:
        self.latest, self.latest_step, self.runs = dict(ONE), latest_step, 0

    def run(self, module: Any) -> dict[str, float]:
        self.runs += 1
        return {**ONE, "sampled/mean_at_1": 0.75}


@pytest.mark.parametrize(("latest", "steps", "runs"), [(4, 4, 0), (2, 4, 1), (0, 0, 1)])
def test_a_fresh_validation_is_not_repeated(latest: int, steps: int, runs: int, tmp_path: Path) -> None:
    """The last validation stands for the policy at the end, if no step came after it."""
    trainer: Any = SimpleNamespace(
        global_step=steps, is_global_zero=True, default_root_dir=str(tmp_path), callbacks=[], loggers=[]
    )
    module: Any = SimpleNamespace(evaluator=Evaluator(latest), base=None, seed=3)
    report = Report()
    report.on_train_end(trainer, module)
    assert module.evaluator.runs == runs
    assert report.rows["after RLVR"]["sampled/mean_at_1"] == (0.75 if runs else 0.25)
    assert json.loads((tmp_path / "report.json").read_text())["seed"] == 3


def test_other_ranks_evaluate_and_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Evaluating is a collective; files and tables are the first rank's."""
    trainer: Any = SimpleNamespace(
        global_step=4, is_global_zero=False, default_root_dir=str(tmp_path / "run"), callbacks=[], loggers=[]
    )
    module: Any = SimpleNamespace(evaluator=Evaluator(0), base=None, seed=3)
    Report().on_train_end(trainer, module)
    assert module.evaluator.runs == 1
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr() == ("", "")


def test_places(tmp_path: Path) -> None:
    """The report, the policy's folder (its own or the default one), and the pages once there are some."""
    trainer: Any = SimpleNamespace(default_root_dir=str(tmp_path), callbacks=[], loggers=[])
    assert places(trainer) == {"report": f"{tmp_path}/report.json"}
    trainer.callbacks = [SavePolicy()]
    assert places(trainer)["trained model"] == f"{tmp_path}/policy"
    trainer.callbacks = [SavePolicy("elsewhere")]
    assert places(trainer)["trained model"] == "elsewhere"
    assert "rollouts" not in places(trainer)
    (tmp_path / "rollouts").mkdir()
    assert "rollouts" not in places(trainer)
    (tmp_path / "rollouts/phase_000000.html").write_text("")
    assert places(trainer)["rollouts"] == f"{tmp_path}/rollouts/index.html"


def test_a_folder_is_printed_by_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Brackets in it are no markup."""
    root = tmp_path / "seed [bold] 0"
    trainer: Any = SimpleNamespace(
        global_step=4, is_global_zero=True, default_root_dir=str(root), callbacks=[], loggers=[]
    )
    Report().on_train_end(trainer, SimpleNamespace(evaluator=Evaluator(4), base=None, seed=3))
    assert f"  report           {root}/report.json\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("base", "step", "name"),
    [(None, 0, "before training"), ("tiny", 0, "after warm start"), ("tiny", 4, "resumed at step 4")],
)
def test_the_first_evaluation_is_named_by_what_came_before(base: str | None, step: int, name: str) -> None:
    """A resumed policy is not the warm start's."""
    module: Any = SimpleNamespace(
        evaluator=Evaluator(0),
        base=base,
        policy="learnt",
        place=lambda policy: policy,
        open_policy=lambda model: model,
        engine=SimpleNamespace(setup=lambda: None),
    )
    report = Report()
    report.on_train_start(cast("Any", SimpleNamespace(global_step=step)), module)
    assert list(report.rows) == ([name] if base is None else ["base", name])
    assert module.policy == "learnt"


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """A run with a warm start of a few steps."""
    folder = tmp_path_factory.mktemp("warm")
    return folder, succeed(
        folder, "fit", *TINY, UNTRACKED, "--warmup={steps: 30, batch_size: 8}", "--trainer.max_steps=2"
    )


def test_the_report_of_a_run(warm: tuple[Path, Outcome]) -> None:
    """Steps, seed, seconds, and the metrics of all three policies."""
    folder, _ = warm
    report = json.loads((folder / "runs/quickstart/report.json").read_text())
    assert list(report) == ["seed", "seconds", "steps", "evaluations"]
    assert (report["seed"], report["steps"]) == (0, 2)
    assert 0 < report["seconds"] < 300
    rows = report["evaluations"]
    assert list(rows) == ["base", "after warm start", "after RLVR"]
    names = {f"{way}/{m}" for way in ("sampled", "greedy") for m in ("mean_at_1", "length", "truncated", "entropy")}
    assert set(rows["base"]) == set(rows["after RLVR"]) == names
    # From random weights an answer is about log(22) = 3.1 nats per token; demonstrations have one digit of ten.
    assert rows["base"]["sampled/entropy"] > 2.8
    assert rows["after warm start"]["sampled/entropy"] < 2.0
    assert rows["after RLVR"]["sampled/entropy"] != rows["after warm start"]["sampled/entropy"]


def test_the_table_and_the_places_are_printed(warm: tuple[Path, Outcome]) -> None:
    """The numbers of ``report.json``, on standard error; every place exists."""
    folder, outcome = warm
    rows = json.loads((folder / "runs/quickstart/report.json").read_text())["evaluations"]
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in outcome.err.splitlines() if "│" in line]
    names = ("sampled/mean_at_1", "greedy/mean_at_1", "sampled/entropy", "sampled/length", "sampled/truncated")
    assert lines == [[policy, *(f"{row[name]:.3f}" for name in names)] for policy, row in rows.items()]
    assert "seed 0, 2 optimiser steps, " in outcome.err
    listed = dict(line.split(maxsplit=1) for line in outcome.err.splitlines() if line.startswith("  r"))
    assert listed == {"report": "runs/quickstart/report.json", "rollouts": "runs/quickstart/rollouts/index.html"}
    assert "trained model    runs/quickstart/policy\n" in outcome.err
    for place in (*listed.values(), "runs/quickstart/policy/model.safetensors"):
        assert (folder / place).exists()
    assert outcome.out == ""


def test_the_commands_that_it_suggests_work(warm: tuple[Path, Outcome]) -> None:
    """Evaluating the policy that was trained, with the settings of its training, on held-out problems."""
    folder, outcome = warm
    suggested = outcome.err.split("try next:\n")[1].splitlines()
    commands = [shlex.split(line) for line in suggested]
    assert [Path(command[0]).name for command in commands] == ["lit-rlvr", "python"]
    tested = succeed(folder, *commands[0][1:], UNTRACKED)
    assert "val/sampled/mean_at_1" in tested.out
    assert (folder / commands[1][-1]).exists()


def test_a_tracked_run_names_its_database(tiny_fit: TinyFit) -> None:
    """The run's id, and a command that opens the database that holds it."""
    found = re.search(r"MLflow run +(\w+) in (\S+)", tiny_fit.outcome.err)
    assert found is not None
    assert MlflowClient(tiny_fit.database).get_run(found[1]).info.status == "FINISHED"
    assert found[2] == tiny_fit.database
    assert f"mlflow ui --backend-store-uri {tiny_fit.database}\n" in tiny_fit.outcome.err
