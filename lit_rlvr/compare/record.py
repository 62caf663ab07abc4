"""A comparison in MLflow: one parent run, and a nested run for each arm and seed."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lit_rlvr.compare.runs import Run
from lit_rlvr.compare.spec import Comparison
from lit_rlvr.compare.table import Table

PARENT = "mlflow_run.txt"
"""In the comparison's folder: the parent run that a second call continues."""


class Record:
    """The comparison's runs in MLflow.

    A nested run is opened here and filled by the run's own logger, so that it can be watched; how it ended is written
    here, because a process that was killed cannot.
    """

    def __init__(self, comparison: Comparison) -> None:
        from mlflow import MlflowClient

        self.comparison = comparison
        self.uri = comparison.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
        self.client = MlflowClient(self.uri)
        found = self.client.get_experiment_by_name(comparison.experiment)
        self.experiment = found.experiment_id if found else self.client.create_experiment(comparison.experiment)
        self.parent = self._parent(comparison.folder / PARENT)
        self.open: dict[Run, str] = {}

    def _parent(self, note: Path) -> str:
        from mlflow.exceptions import MlflowException

        if note.exists():
            run_id = note.read_text(encoding="utf-8").strip()
            try:
                self.client.update_run(run_id, status="RUNNING")
            except MlflowException:  # another database, or it was deleted there
                pass
            else:
                return run_id
        tags = {"comparison": self.comparison.name, "baseline": self.comparison.baseline}
        created = self.client.create_run(self.experiment, run_name=self.comparison.name, tags=tags)
        note.write_text(f"{created.info.run_id}\n", encoding="utf-8")
        return str(created.info.run_id)

    def begin(self, run: Run) -> dict[str, Any]:
        """Open a nested run, and return the logger that fills it."""
        tags = {
            "mlflow.parentRunId": self.parent, "comparison": self.comparison.name, "arm": run.arm,
            "seed": str(run.seed),
        }  # fmt: skip
        created = self.client.create_run(self.experiment, run_name=str(run), tags=tags)
        self.open[run] = created.info.run_id
        # The policy lies in the run's folder; a copy of each would fill the disk.
        settings = {"tracking_uri": self.uri, "run_id": created.info.run_id, "log_model": False}
        return {"class_path": "MLflow", "init_args": {"experiment_name": self.comparison.experiment, **settings}}

    def end(self, run: Run) -> None:
        """Write down how a nested run ended."""
        self.client.set_terminated(self.open.pop(run), "FINISHED" if run.state() == "done" else "FAILED")

    def close(self, status: str) -> None:
        """End the parent run with ``status``; nested runs that are still open were stopped."""
        for run_id in self.open.values():
            self.client.set_terminated(run_id, "KILLED")
        self.open.clear()
        self.client.set_terminated(self.parent, status)

    def results(self, table: Table, files: Iterable[Path]) -> None:
        """Keep the table with the parent run: its files, and every mean as a metric ``<measure>/<arm>``."""
        for file in files:
            self.client.log_artifact(self.parent, str(file))
        for measure, rows in table.measures:
            for row in rows:
                if row.summary.mean is not None:
                    self.client.log_metric(self.parent, f"{measure.name}/{row.arm}", row.summary.mean)
