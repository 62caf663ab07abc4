"""The run in the terminal: a live table of the last phases and a bar, or plain lines where there is no terminal."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from lit_rlvr.diagnostics import diagnostics
from lit_rlvr.terminal import console

COLUMNS: dict[str, tuple[str, str]] = {
    "step": ("step", "{:.0f}"),
    "reward": ("rollout/reward", "{:.3f}"),
    "correct": ("rollout/correct", "{:.3f}"),
    "entropy": ("rollout/entropy", "{:.4f}"),
    "groups": ("rollout/usable_groups", "{:.0f}"),
    "kept": ("credit/kept_fraction", "{:.1%}"),
    "length": ("rollout/length", "{:.1f}"),
    "tokens/s": ("rollout/tokens_per_s", "{:,.0f}"),
    "sample s": ("time/generate_s", "{:.2f}"),
    "learn s": ("time/learn_s", "{:.2f}"),
}
"""Heading: (metric, format)."""


class RLVRProgress(ProgressBar):
    """Shows reward, outcome, entropy, kept fraction, length, speed and phase times, with the time left.

    Below the live table, and once at the end of plain lines, stand the last phase's diagnostics: what each callback
    did, clip fractions, ratios, KL and gradient norm.

    Also logs ``time/learn_s``, the seconds from the end of a phase's rollouts to the end of its last optimiser step.

    Args:
        rows: Phases kept in the live table.
        interval: Seconds between two plain lines, where standard error is not a terminal.
        quiet: Show nothing.

    Raises:
        ValueError: When a number is out of range.
    """

    def __init__(self, rows: int = 8, interval: float = 2.0, quiet: bool = False) -> None:
        super().__init__()
        if rows < 1:
            raise ValueError(f"RLVRProgress.rows must be at least 1, got {rows}")
        if not interval >= 0:
            raise ValueError(f"RLVRProgress.interval must be at least 0 seconds, got {interval}")
        self.rows, self.interval, self.quiet = rows, interval, quiet
        self._recent: deque[dict[str, float]] = deque(maxlen=rows)
        self._live: Live | None = None
        self._bar: Progress | None = None
        self._task: Any = None
        self._said = 0.0
        self._header = self._shown = False

    def disable(self) -> None:
        self.quiet = True

    def enable(self) -> None:
        self.quiet = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._recent.clear()
        self._said, self._header, self._shown = 0.0, False, False
        if self.quiet or not trainer.is_global_zero:
            return
        self._bar = Progress(
            TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("optimiser steps"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=console(),
        )  # fmt: skip
        total = min((n for n in (trainer.max_steps, trainer.estimated_stepping_batches) if n > 0), default=None)
        self._task = self._bar.add_task("training", total=None if total == float("inf") else total)
        self._bar.update(self._task, completed=trainer.global_step)
        if console().is_terminal:
            self._live = Live(self._render(), console=console(), refresh_per_second=4, transient=False)
            self._live.start()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        last_of_phase = batch.minibatch == pl_module.batch.steps_per_phase - 1
        now, row = time.perf_counter(), dict[str, float]()
        if last_of_phase and pl_module.phase is not None:
            seconds = {"time/learn_s": now - pl_module.phase.ready}
            pl_module.emit(seconds, trainer.global_step)
            row = {"step": trainer.global_step, **pl_module.phase.metrics, **pl_module.step_metrics, **seconds}
        if self._bar is None:
            return
        self._bar.update(self._task, completed=trainer.global_step)
        if row:
            self._recent.append(row)
            if self._live is None:
                self._say(now)
        if self._live is not None:
            self._live.update(self._render())

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self._bar is None or trainer.sanity_checking:  # quiet, another rank, or the command that prints a table
            return
        values = {n: float(v) for n, v in trainer.callback_metrics.items() if n.startswith("val/") and "_at_" in n}
        if values:
            listed = ", ".join(f"{name.removeprefix('val/')} {value:.3f}" for name, value in values.items())
            console().print(f"validation at step {trainer.global_step}: {listed}")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._live is None and self._bar is not None and self._recent and not self._shown:
            self._say(float("inf"))
        if self._live is None and self._bar is not None and self._recent:
            for line in diagnostics(self._recent[-1]):
                console().print(line)
        self._stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._live is not None:
            self._live.stop()
        self._live = self._bar = None

    def _cells(self, row: dict[str, float]) -> list[str]:
        named = {"step": row["step"], **row}
        return [form.format(named[key]) if key in named else "–" for key, form in COLUMNS.values()]

    def _render(self) -> Group:
        table = Table(box=None, pad_edge=False, header_style="dim")
        for heading in COLUMNS:
            table.add_column(heading, justify="right", min_width=8, no_wrap=True)
        for row in self._recent:
            table.add_row(*self._cells(row))
        assert self._bar is not None
        lines = diagnostics(self._recent[-1]) if self._recent else []
        return Group(table, *(Text(line, style="dim", no_wrap=True, overflow="ellipsis") for line in lines), self._bar)

    def _say(self, now: float) -> None:
        self._shown = now - self._said >= self.interval
        if not self._shown:
            return
        if not self._header:
            console().print("".join(f"{heading:>10}" for heading in COLUMNS))
            self._header = True
        console().print("".join(f"{cell:>10}" for cell in self._cells(self._recent[-1])))
        self._said = now
