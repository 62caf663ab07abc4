"""The closing table: what training did to the policy on held-out problems."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from rich.table import Table

from lit_rlvr.credit import all_callbacks
from lit_rlvr.saving import SavePolicy
from lit_rlvr.terminal import console
from lit_rlvr.tracking import MLflow, mlflow_loggers


class Report(Callback):
    """Evaluates before and after training, prints both as a table and says where everything lies.

    Also writes ``report.json`` into the trainer's ``default_root_dir``, and stores it in MLflow.
    """

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, float]] = {}
        self._started = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._started = time.perf_counter()
        if pl_module.base is not None:
            policy = pl_module.policy
            pl_module.policy = pl_module.place(pl_module.open_policy(pl_module.base))
            self.rows["base"] = pl_module.evaluator.run(pl_module)
            pl_module.policy = policy
            pl_module.engine.setup()  # an engine's copy of the weights is of another policy after as many steps
        before = "before training" if pl_module.base is None else "after warm start"
        if trainer.global_step > 0:
            before = f"resumed at step {trainer.global_step}"
        self.rows[before] = pl_module.evaluator.run(pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        evaluator = pl_module.evaluator
        fresh = evaluator.latest_step == trainer.global_step and trainer.global_step > 0
        self.rows["after RLVR"] = evaluator.latest if fresh else evaluator.run(pl_module)
        if not trainer.is_global_zero:
            return
        seconds = time.perf_counter() - self._started
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        facts = {"seed": pl_module.seed, "seconds": seconds, "steps": trainer.global_step, "evaluations": self.rows}
        text = json.dumps(facts, indent=2) + "\n"
        (folder / "report.json").write_text(text, encoding="utf-8")
        for logger in mlflow_loggers(trainer):
            logger.log_text(text, "report.json")
        console().print(closing_table(self.rows))
        steps = f"{trainer.global_step} optimiser step{'' if trainer.global_step == 1 else 's'}"
        console().print(f"seed {pl_module.seed}, {steps}, {seconds:.0f} s")
        found = places(trainer)
        for name, place in found.items():
            console().print(f"  {name:<16} {place}", markup=False)
        console().print("try next:")
        for command in next_commands(trainer, found):
            console().print(f"  {command}", markup=False)


def closing_table(rows: dict[str, dict[str, float]]) -> Table:
    """A table with one row per evaluated policy: accuracies, then entropy and length of the first evaluation.

    Of held-out sets it shows the mean accuracy alone.
    """
    table = Table(title="held-out problems", title_justify="left")
    table.add_column("policy")
    metrics = {name: None for row in rows.values() for name in row}
    ways = list(dict.fromkeys(name.split("/")[0] for name in metrics))
    over_all = [n for n in metrics if n.count("/") == 1]
    shown = [n for n in over_all if n.split("/")[1].startswith(("mean_at", "maj_at"))]
    shown += [n for n in over_all if "pass_at" in n and not n.endswith("pass_at_1")]
    shown += [n for n in metrics if n not in over_all and "/mean_at" in n]
    shown += [f"{ways[0]}/{n}" for n in ("entropy", "length", "truncated")]
    for name in shown:
        table.add_column(name.replace("/", "\n").replace("_at_", "@"), justify="right")
    for policy, row in rows.items():
        table.add_row(policy, *(f"{row[name]:.3f}" if name in row else "–" for name in shown))
    return table


def next_commands(trainer: Any, found: dict[str, str]) -> list[str]:
    """Commands that make sense after a run."""
    started = Path(sys.argv[0])
    program = str(started) if started.name == "lit-rlvr" and not started.is_absolute() else "lit-rlvr"
    bin_ = program.removesuffix("lit-rlvr")
    commands = []
    config = Path(trainer.default_root_dir) / "config.yaml"
    if "trained model" in found and config.exists():
        commands.append(f"{program} validate --config {config} --model.model={found['trained model']}")
    uris = [logger.tracking_uri for logger in trainer.loggers if isinstance(logger, MLflow)]
    commands += [f"{bin_}mlflow ui --backend-store-uri {uri}" for uri in uris]
    if "rollouts" in found:
        commands.append(f"{bin_}python -m webbrowser -t {found['rollouts']}")
    return commands


def places(trainer: Any) -> dict[str, str]:
    """Where the run's results lie."""
    root = Path(trainer.default_root_dir)
    found = {"report": str(root / "report.json")}
    for callback in all_callbacks(trainer):
        if isinstance(callback, SavePolicy):
            found["trained model"] = str(callback.place(trainer))
            if callback.best is not None:
                what = f"{callback.monitor} {callback.best:.3f} at step {callback.best_step}"
                found["best policy"] = f"{callback.place_of_best(trainer)} ({what})"
    if list((root / "rollouts").glob("phase_*.html")):
        found["rollouts"] = str(root / "rollouts" / "index.html")
    for logger in trainer.loggers:
        if isinstance(logger, MLflow):
            found["MLflow run"] = f"{logger.run_id} in {logger.tracking_uri}"
    return found
