"""What MLflow knows of a run: settings, tags, metrics step by step, files."""

from __future__ import annotations

import csv
import json
import subprocess
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import yaml
from command_line import CONFIGS, SMALL, TinyFit, saved_weights, succeed
from lightning.pytorch.utilities import rank_zero_only
from mlflow import MlflowClient
from mlflow.entities import Run

from lit_rlvr.tracking import MLflow, flatten, git_commit, mlflow_loggers


@pytest.fixture(scope="module")
def client(tiny_fit: TinyFit) -> MlflowClient:
    """MLflow's own view of the database."""
    return MlflowClient(tiny_fit.database)


@pytest.fixture(scope="module")
def run(client: MlflowClient, tiny_fit: TinyFit) -> Run:
    """The one run in the database."""
    experiment = client.get_experiment_by_name("lit-rlvr")
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id])
    return found


def history(client: MlflowClient, run: Run, name: str) -> dict[int, float]:
    """A metric's value by step, each of which was logged once."""
    points = client.get_metric_history(run.info.run_id, name)
    assert len({p.step for p in points}) == len(points), name
    return {p.step: p.value for p in sorted(points, key=lambda p: int(p.step))}


def names(run: Run, prefix: str) -> set[str]:
    return {name.removeprefix(prefix) for name in run.data.metrics if name.startswith(prefix)}


def test_flatten() -> None:
    """Lists are numbered; null and empty settings are left out, false and zero are not."""
    tree: dict[str, Any] = {"a": [{"b": 0}, [False, None]], "c": {"d": {}, "e": []}, "f": None, "g": "", "h": (1, 2)}
    assert flatten(tree) == {"a.0.b": 0, "a.1.0": False, "g": "", "h": (1, 2)}


def test_parameters_are_the_resolved_settings(run: Run, tiny_fit: TinyFit) -> None:
    """``config.yaml`` flattened, interpolations and defaults filled in."""
    settings = flatten(yaml.safe_load((tiny_fit.root / "config.yaml").read_text()))
    betas = {name: value for name, value in settings.items() if ".betas." in name}
    expected = {name: str(value) for name, value in settings.items() if name not in betas}
    assert {n: v for n, v in run.data.params.items() if not n.endswith(".betas")} == expected
    assert run.data.params["model.optimizer.init_args.betas"] == str(tuple(betas.values()))
    assert run.data.params["model.evaluations.greedy.temperature"] == "0.0"
    assert run.data.params["trainer.callbacks.2.init_args.every"] == "1"


def test_tags(run: Run) -> None:
    """Task, algorithm, chain, model, versions; the run's folder lies in no repository."""
    tags = {name: value for name, value in run.data.tags.items() if not name.startswith("mlflow.")}
    packages = ("lit-rlvr", "torch", "lightning", "transformers", "torchmetrics", "mlflow")
    assert {name: tags.pop(f"version.{name}") for name in packages} == {name: version(name) for name in packages}
    assert "StageDetector → EntropyTopK" in tags.pop("credit")
    assert tags == {
        "task": "FewSums(seed=0)",
        "algorithm": "GroupNormalized(eps=1e-06) + ClippedSurrogate(clip_low=0.2, clip_high=0.28, dual_clip=None)"
        " + TokenMean() + DynamicSampling(max_rounds=2)",
        "model": "builtin:tiny-qwen3-75k",
        "git_commit": "none",
    }
    assert run.info.status == "FINISHED"


def test_learning_is_logged_at_every_optimiser_step(run: Run, client: MlflowClient) -> None:
    """Once at each of the steps 1 to 4; the phases' first updates start from their own policy."""
    logged = names(run, "train/")
    assert logged == {
        "loss", "tokens", "ratio", "ratio_max", "ratio_min", "clip_low", "clip_high", "kl_old", "entropy", "grad_norm",
        "lr", "skipped_steps", "skipped_rows", "padding",
    }  # fmt: skip
    for name in logged:
        assert list(history(client, run, f"train/{name}")) == [1, 2, 3, 4], name
    ratio = history(client, run, "train/ratio")
    assert [ratio[1], ratio[3]] == pytest.approx([1, 1], abs=1e-6)
    assert abs(ratio[2] - 1) > 1e-4
    assert all(value > 0 for value in history(client, run, "train/grad_norm").values())
    assert set(history(client, run, "train/skipped_steps").values()) == {0.0}


def test_the_learning_rate_is_the_one_of_the_step(run: Run, client: MlflowClient) -> None:
    """LinearLR from a fifth of 3e-4 to all of it in 5 steps."""
    expected = {step: 3e-4 * (0.2 + 0.8 * (step - 1) / 5) for step in (1, 2, 3, 4)}
    assert history(client, run, "train/lr") == pytest.approx(expected)


def test_a_rollout_is_logged_once_per_phase(run: Run, client: MlflowClient) -> None:
    """With the phase's first optimiser step, its callbacks' numbers and its times included."""
    assert names(run, "rollout/") >= {"reward", "correct", "entropy", "length", "usable_groups", "tokens_per_s"}
    assert names(run, "time/") >= {"generate_s", "verify_s", "score_s", "credit_s", "phase_s", "learn_s"}
    assert names(run, "credit/EntropyTopK/") >= {"kept_fraction", "threshold", "entropy_kept", "entropy_dropped"}
    assert names(run, "credit/StageDetector/") >= {"smoothed_entropy", "plateau"}
    logged = [name for name in run.data.metrics if name.startswith(("rollout/", "time/", "credit/"))]
    for name in logged:
        assert list(history(client, run, name)) == ([2, 4] if name == "time/learn_s" else [1, 3]), name
    usable, rounds = (history(client, run, f"rollout/{name}") for name in ("usable_groups", "rounds"))
    assert all(4 <= groups <= 8 for groups in usable.values())
    assert all(1 <= number <= 2 for number in rounds.values())
    kept, share = history(client, run, "credit/kept_fraction"), history(client, run, "credit/EntropyTopK/kept_fraction")
    assert kept == share
    assert all(0.2 <= value < 0.21 for value in kept.values())


def test_tokens_are_counted_right(run: Run, client: MlflowClient, tiny_fit: TinyFit) -> None:
    """A phase's optimiser steps together learn from the share of its tokens that the callback kept."""
    for first, phase in ((1, 0), (3, 1)):
        lines = (tiny_fit.root / f"rollouts/phase_{phase:06d}.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        assert len(rows) == 16
        kept = sum(w > 0 for row in rows for w in row["weight"])
        learning = history(client, run, "train/tokens")
        assert learning[first] + learning[first + 1] == kept


def test_an_evaluation_is_logged_by_its_names(run: Run, client: MlflowClient) -> None:
    measures = {"mean_at_1", "length", "truncated", "entropy"}
    assert names(run, "val/") == {f"{way}/{measure}" for way in ("sampled", "greedy") for measure in measures}


def test_an_evaluation_is_logged_at_its_step(run: Run, client: MlflowClient, tiny_fit: TinyFit) -> None:
    """Where the terminal and the metrics of training say that it was: after steps 2 and 4."""
    assert "validation at step 2:" in tiny_fit.outcome.err
    assert list(history(client, run, "val/sampled/mean_at_1")) == [2, 4]


def test_files(client: MlflowClient, run: Run, tiny_fit: TinyFit, tmp_path: Path) -> None:
    """Configuration, report, each phase's rollouts twice, and the policy: the same as in the run's folder."""
    kept = Path(client.download_artifacts(run.info.run_id, "", str(tmp_path)))
    files = {str(path.relative_to(kept)) for path in kept.rglob("*") if path.is_file()}
    phases = {f"rollouts/phase_00000{n}.{kind}" for n in (0, 1) for kind in ("jsonl", "html")}
    policy = {f"policy/{name}" for name in ("model.safetensors", "tokenizer.json", "config.json")}
    assert files >= {"config.yaml", "report.json", *phases, *policy}
    for name in files:
        assert (kept / name).read_bytes() == (tiny_fit.root / name).read_bytes(), name


def test_a_run_that_goes_on_keeps_its_parameters(tiny_fit: TinyFit, tmp_path: Path) -> None:
    """Parameters are written once; what changed is a tag, what is new is added, long values are no change."""
    uri = tiny_fit.database
    first = MLflow(uri, "another experiment", artifact_location=str(tmp_path))
    first.log_params_once({"lr": 0.1, "seed": 1, "long": "x" * 300})
    again = MLflow(uri, "another experiment", run_id=first.run_id)
    again.log_params_once({"lr": 0.2, "seed": 1, "long": "x" * 300, "new": True})
    found = MlflowClient(uri).get_run(str(first.run_id)).data
    assert found.params == {"lr": "0.1", "seed": "1", "long": "x" * 250, "new": "True"}
    assert {n: v for n, v in found.tags.items() if n.startswith("resumed.")} == {"resumed.lr": "0.2"}


@pytest.mark.slow
def test_a_fit_may_go_on_with_a_run(tiny_fit: TinyFit, tmp_path: Path) -> None:
    """``--trainer.logger.run_id`` with another learning rate: one run, finished, that says what changed."""
    options = (*SMALL, "--trainer.max_steps=2", "--trainer.logger.log_model=false")
    succeed(tmp_path, "fit", *options)
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = client.search_runs(["1"])
    succeed(tmp_path, "fit", *options, f"--trainer.logger.run_id={run.info.run_id}", "--model.optimizer.lr=0.5")
    (again,) = client.search_runs(["1"])
    assert again.data.params["model.optimizer.init_args.lr"] == "0.0003"
    changed = {name: value for name, value in again.data.tags.items() if name.startswith("resumed.")}
    assert changed == {"resumed.model.optimizer.init_args.lr": "0.5"}
    assert again.info.status == "FINISHED"
    assert [f.path for f in client.list_artifacts(run.info.run_id, "policy")] == []  # log_model: false


@pytest.mark.parametrize("fragment", ["none", "csv", "mlflow"])
def test_the_fragments_of_loggers(fragment: str, tmp_path: Path) -> None:
    """Nothing, a CSV file with a row per step, or MLflow's database."""
    succeed(tmp_path, "fit", *SMALL, "--trainer.max_steps=2", "--config", str(CONFIGS / f"logger/{fragment}.yaml"))
    root = tmp_path / "runs/quickstart"
    assert (tmp_path / "mlflow.db").exists() == (tmp_path / "mlruns").exists() == (fragment == "mlflow")
    assert (root / "metrics").exists() == (fragment == "csv")
    assert (root / "config.yaml").exists()
    assert saved_weights(root / "policy")
    if fragment == "csv":
        with (root / "metrics/version_0/metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert [row["step"] for row in rows if row["train/loss"]] == ["1", "2"]
        assert [row["step"] for row in rows if row["rollout/reward"]] == ["1"]
        assert float(rows[0]["credit/kept_fraction"]) == pytest.approx(0.2, abs=0.01)


def test_only_the_first_rank_opens_a_database(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On other ranks the logger takes everything and does nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    logger = MLflow()
    logger.log_metrics({"a": 1.0}, step=1)
    logger.log_params_once({"a": 1})
    logger.finalize("success")
    trainer: Any = SimpleNamespace(loggers=[logger], is_global_zero=False)
    assert mlflow_loggers(trainer) == []
    assert list(tmp_path.iterdir()) == []
    trainer.is_global_zero = True
    assert mlflow_loggers(trainer) == [logger]


def test_the_address_of_the_database(monkeypatch: pytest.MonkeyPatch) -> None:
    """The argument, then MLflow's own variable, then a file beside you; another rank opens none of them.

    With the folder's name: MLflow would give the same connection to whoever asks for the same address elsewhere.
    """
    opened: list[str] = []
    monkeypatch.setattr("mlflow.tracking.MlflowClient", opened.append)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    MLflow()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///variable.db")
    MLflow()
    MLflow("sqlite:///argument.db")
    assert opened == [f"sqlite:///{Path.cwd()}/{name}.db" for name in ("mlflow", "variable", "argument")]
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    MLflow("sqlite:///argument.db")
    assert opened[3:] == ["http://127.0.0.1"]


def test_each_folder_has_a_database_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one process, with the same relative address, which is the one that is shown."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        logger = MLflow()
        assert logger.tracking_uri == "sqlite:///mlflow.db"
        logger.tag(folder=name)
        runs = MlflowClient(f"sqlite:///{tmp_path}/{name}/mlflow.db").search_runs([logger.experiment_id])
        assert [run.data.tags["folder"] for run in runs] == [name]


def test_the_commit_of_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Marked when tracked files differ from it; ``none`` outside a repository, and where git is slow or missing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_commit() == "none"

    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=x", "-c", "user.email=x@y.invalid", "-c", "commit.gpgsign=false")
        done = subprocess.run(["git", *identity, *arguments], capture_output=True, text=True, check=True, timeout=60)
        return done.stdout.strip()

    git("init")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-m", "one")
    assert git_commit() == git("rev-parse", "HEAD")
    (tmp_path / "new").write_text("not tracked")
    assert "+" not in git_commit()
    (tmp_path / "file").write_text("two")
    assert git_commit() == git("rev-parse", "HEAD") + "+changes"
    for error in (FileNotFoundError("git"), subprocess.TimeoutExpired("git", 10)):
        monkeypatch.setattr("lit_rlvr.tracking.subprocess.run", Mock(side_effect=error))
        assert git_commit() == "none"
        monkeypatch.undo()
        monkeypatch.chdir(tmp_path)
