"""MLflow: a logger with working defaults, and a record of what was run."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import MLFlowLogger
from lightning.pytorch.utilities import rank_zero_only

from lit_rlvr.credit import all_callbacks, credit_chain, describe_chain
from lit_rlvr.loggers import log_settings, others

log = logging.getLogger(__name__)

PACKAGES = ("lit-rlvr", "torch", "lightning", "transformers", "torchmetrics", "mlflow")
LARGEST = 2**30
"""Bytes of a policy that is uploaded unless something is said: that of a large model would lie there twice."""


class MLflow(MLFlowLogger):
    """MLflow with a database that works out of the box; only the first rank opens it.

    Look at the runs with ``mlflow ui --backend-store-uri sqlite:///mlflow.db``.

    Args:
        tracking_uri: Where runs are kept; null: ``$MLFLOW_TRACKING_URI``, or ``sqlite:///mlflow.db``. A relative path
            of a database starts at the folder in which the logger is made.
        experiment_name: Experiment that the run belongs to.
        run_name: Name of the run; null: the time.
        run_id: Continue this run.
        artifact_location: Where a new experiment keeps files; null: ``mlruns`` in the current folder.
        log_model: Upload the trained policy's folder at the end of training. Otherwise ``policy.json`` says where the
            folder is, with size and SHA-256 of each file. null: upload at most 1 GiB.
    """

    def __init__(
        self,
        tracking_uri: str | None = None,
        experiment_name: str = "lit-rlvr",
        run_name: str | None = None,
        run_id: str | None = None,
        artifact_location: str | None = None,
        log_model: bool | None = None,
    ) -> None:
        self.tracking_uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
        self.log_policy = log_model
        self._asked_for = run_id is not None
        # Opening the database on every rank at once breaks a fresh one; this address is never connected to.
        uri = anchored(self.tracking_uri) if getattr(rank_zero_only, "rank", 0) in (None, 0) else "http://127.0.0.1"
        super().__init__(
            experiment_name,
            run_name or time.strftime("%Y-%m-%d %H:%M:%S"),
            uri,
            save_dir=None,
            artifact_location=artifact_location,
            run_id=run_id,
        )

    @property
    def save_dir(self) -> None:
        """None: files go below the trainer's ``default_root_dir``."""

    @property
    def name(self) -> str:
        """The experiment. Asking for it, or for the version, opens no run."""
        return self._experiment_name

    @property
    def version(self) -> str:
        """The run, once it is open."""
        return self._run_id or ""

    def resume(self, run_id: str) -> None:
        """Continue ``run_id`` instead of a fresh run, unless the database does not know it, or a run was asked for.

        Lightning opens a run before it reads the checkpoint; that one is still empty, and is deleted.
        """
        from mlflow.exceptions import MlflowException

        if self._asked_for or run_id == self._run_id:
            return
        try:
            self._mlflow_client.update_run(run_id, status="RUNNING")
        except MlflowException:
            log.warning("the checkpoint's MLflow run %s is not in %s; a new one is begun", run_id, self.tracking_uri)
            return
        if self._run_id is not None:
            self._mlflow_client.delete_run(self._run_id)
        self._run_id = run_id

    @property
    def experiment(self) -> Any:
        """MLflow's client, with the run open; a dummy on other ranks.

        Lightning makes the address the process's default, in the environment too, where the next logger would find it.
        """
        with patch.dict(os.environ):
            return super().experiment

    @property
    def client(self) -> Any:
        """MLflow's client, with the run open. First rank only."""
        return self.experiment

    def log_text(self, text: str, name: str) -> None:
        """Store ``text`` as the artifact ``name``."""
        self.client.log_text(self.run_id, text, name)

    def log_folder(self, folder: Path, name: str) -> None:
        """Store a folder as the artifact ``name``."""
        self.client.log_artifacts(self.run_id, str(folder), name)

    def tag(self, **tags: str) -> None:
        """Set tags of the run."""
        for name, value in tags.items():
            self.client.set_tag(self.run_id, name, value)

    @rank_zero_only
    def log_params_once(self, params: dict[str, Any]) -> None:
        """Log parameters; one that a resumed run has already with another value becomes a ``resumed.`` tag."""
        have = self.client.get_run(self.run_id).data.params
        fresh = {}
        for name, value in params.items():
            text = str(value)[:250]
            if name not in have:
                fresh[name] = text
            elif have[name] != text:
                self.tag(**{f"resumed.{name}": text})
        self.log_hyperparams(fresh)


def anchored(uri: str) -> str:
    """The address with a database's path from the root: MLflow keeps one connection per address, whatever the folder.

    >>> anchored("sqlite:////tmp/mlflow.db"), anchored("http://host:5000")
    ('sqlite:////tmp/mlflow.db', 'http://host:5000')
    """
    scheme, mark, path = uri.partition(":///")
    if not mark or not scheme.startswith("sqlite") or path[:1] in ("", "/", ":"):
        return uri
    return f"{scheme}:///{Path(path).absolute()}"


def mlflow_loggers(trainer: pl.Trainer) -> list[MLflow]:
    """The trainer's MLflow loggers, on the first rank; none elsewhere."""
    return [x for x in trainer.loggers if isinstance(x, MLflow)] if trainer.is_global_zero else []


class RunRecord(Callback):
    """Tells every logger what was run: task, algorithm, credit, versions and git commit; MLflow keeps the policy too.

    A resumed run continues the MLflow run of its checkpoint.
    """

    def __init__(self) -> None:
        self._run_id: str | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        facts = {
            "task": repr(pl_module.data.task)[:500],
            "algorithm": describe_algorithm(pl_module),
            "credit": describe_chain(credit_chain(all_callbacks(trainer))).removeprefix("credit: "),
            "model": pl_module.base or pl_module.model,
            "git_commit": git_commit(),
            **{f"version.{name}": version(name) for name in PACKAGES},
        }
        for logger in mlflow_loggers(trainer):
            if self._run_id is not None:
                logger.resume(self._run_id)
            logger.tag(**facts)
            self._run_id = logger.run_id
        log_settings(others(trainer, MLflow), {f"run.{name}": value for name, value in facts.items()})

    def state_dict(self) -> dict[str, Any]:
        return {"run_id": self._run_id}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._run_id = state_dict["run_id"]

    def on_fit_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        from lit_rlvr.saving import SavePolicy, inventory, size_of

        saved = [c.saved for c in all_callbacks(trainer) if isinstance(c, SavePolicy) and c.saved is not None]
        for logger in mlflow_loggers(trainer):
            for folder in saved:
                if logger.log_policy or (logger.log_policy is None and size_of(folder) <= LARGEST):
                    logger.log_folder(folder, "policy")
                else:
                    logger.log_text(json.dumps(inventory(folder), indent=2) + "\n", "policy.json")


class SaveConfig(SaveConfigCallback):
    """Keeps the resolved configuration: ``config.yaml`` in ``default_root_dir``, settings in every logger.

    It is in checkpoints too; what differs when a run is resumed is printed.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "save_to_log_dir": False})

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Nothing yet: which MLflow run to write to is known only after a checkpoint has been read."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.save_config(trainer, pl_module, "fit")

    def save_config(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        text = self.parser.dump(self.config, skip_none=False)
        if trainer.is_global_zero:
            folder = Path(trainer.default_root_dir)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.yaml").write_text(text, encoding="utf-8")
        for logger in mlflow_loggers(trainer):
            logger.log_text(text, "config.yaml")
            logger.log_params_once(self._flat())
        log_settings(others(trainer, MLflow), self._flat())

    def _flat(self) -> dict[str, Any]:
        return {n: v for n, v in flatten(self.config.as_dict()).items() if not n.startswith(("config.", "ckpt_path"))}

    def state_dict(self) -> dict[str, Any]:
        return {name: str(value) for name, value in self._flat().items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        now = self.state_dict()
        for name in sorted(now.keys() | state_dict.keys()):
            then, value = state_dict.get(name, "unset"), now.get(name, "unset")
            if then != value:
                log.info("resume: %s is %s; it was %s in the checkpoint", name, value, then)


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted names; empty ones are left out.

    >>> flatten({"a": {"b": 1, "c": None}, "d": [{"e": 2}]})
    {'a.b': 1, 'd.0.e': 2}
    """
    if isinstance(tree, dict):
        items = tree.items()
    elif isinstance(tree, list):
        items = {str(i): value for i, value in enumerate(tree)}.items()
    else:
        return {} if tree is None else {prefix.removesuffix("."): tree}
    return {name: value for key, branch in items for name, value in flatten(branch, f"{prefix}{key}.").items()}


def describe_algorithm(module: Any) -> str:
    """The algorithm's parts in one line."""
    parts = [module.advantage, module.loss, module.aggregation, module.kl, module.overlong, module.dynamic_sampling]
    return " + ".join(repr(part) for part in parts if part is not None)[:500]


def git_commit() -> str:
    """The commit of the working folder, with ``+changes`` when files differ from it; ``none`` outside a repository."""
    try:
        commit = _git("rev-parse", "HEAD")
        return commit + ("+changes" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return "none"


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()
