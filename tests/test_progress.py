"""What a run shows while it trains: a live table in a terminal, lines elsewhere, nothing when quiet."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from lit_rlvr.data import Ticket
from lit_rlvr.progress import COLUMNS, RLVRProgress

METRICS = {
    "rollout/reward": 0.4375, "rollout/correct": 0.25, "rollout/entropy": 1.23456, "rollout/usable_groups": 31.0,
    "credit/kept_fraction": 0.2004, "rollout/length": 17.26, "rollout/tokens_per_s": 12345.6, "time/generate_s": 0.5,
}  # fmt: skip


class Run:
    """Calls the hooks of a progress bar as a Trainer with two optimiser steps per phase does; time is set by hand."""

    def __init__(self, progress: RLVRProgress, monkeypatch: pytest.MonkeyPatch, terminal: bool, first: bool = True):
        self.progress, self.now = progress, 1000.0
        self.console = Console(
            file=io.StringIO(), record=True, force_terminal=terminal, width=120, highlight=False, soft_wrap=True
        )
        monkeypatch.setattr("lit_rlvr.progress.console", lambda: self.console)
        monkeypatch.setattr("lit_rlvr.progress.time", SimpleNamespace(perf_counter=lambda: self.now))
        self.trainer: Any = SimpleNamespace(
            is_global_zero=first, max_steps=10, estimated_stepping_batches=float("inf"), global_step=0,
            callback_metrics={}, sanity_checking=False,
        )  # fmt: skip
        self.logged: list[tuple[dict[str, float], int]] = []
        self.module: Any = SimpleNamespace(
            phase=None,
            step_metrics={},
            batch=SimpleNamespace(steps_per_phase=2),
            emit=lambda metrics, step: self.logged.append((metrics, step)),
        )

    def start(self) -> None:
        self.progress.on_train_start(self.trainer, self.module)

    def phase(self, now: float, **changed: float) -> None:
        """A phase whose last optimiser step ends at ``now``, a quarter of a second after learning began."""
        number = self.trainer.global_step // 2
        self.now = now
        self.module.phase = SimpleNamespace(metrics={**METRICS, **changed}, ready=now - 0.25)
        for minibatch in (0, 1):
            self.trainer.global_step += 1
            self.progress.on_train_batch_end(self.trainer, self.module, None, Ticket(number, minibatch), 0)

    def end(self) -> None:
        self.progress.on_train_end(self.trainer, self.module)

    def text(self) -> str:
        """What was printed so far; in a live display, the last frame stands at the end."""
        return self.console.export_text(clear=False)

    def lines(self) -> list[list[str]]:
        return [line.split() for line in self.text().splitlines()]


def test_plain_lines_have_one_header_and_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(RLVRProgress(), monkeypatch, terminal=False)
    run.start()
    assert run.text() == ""
    run.phase(1000.0)
    run.phase(1010.0, **{"rollout/reward": 0.5, "time/generate_s": 1.0})
    run.end()
    assert " ".join(run.lines()[0]) == " ".join(COLUMNS)
    assert run.lines()[1:] == [
        ["2", "0.438", "0.250", "1.2346", "31", "20.0%", "17.3", "12,346", "0.50", "0.25"],
        ["4", "0.500", "0.250", "1.2346", "31", "20.0%", "17.3", "12,346", "1.00", "0.25"],
    ]
    assert {len(line) for line in run.text().splitlines()} == {10 * len(COLUMNS)}  # headings stand above their numbers


def test_plain_lines_keep_their_distance(monkeypatch: pytest.MonkeyPatch) -> None:
    """At least ``interval`` seconds lie between two, but the last phase is always shown, and once."""
    run = Run(RLVRProgress(interval=5.0), monkeypatch, terminal=False)
    run.start()
    for now in (1000.0, 1001.0, 1004.9, 1005.0, 1006.0, 1007.0):
        run.phase(now)
    assert [line[0] for line in run.lines()] == ["step", "2", "8"]
    run.end()
    assert [line[0] for line in run.lines()] == ["step", "2", "8", "12"]
    run.end()
    assert len(run.lines()) == 4


def test_a_last_phase_that_was_shown_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(RLVRProgress(), monkeypatch, terminal=False)
    run.start()
    run.phase(1000.0)
    run.end()
    assert [line[0] for line in run.lines()] == ["step", "2"]


def test_a_second_training_is_shown_like_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a notebook one Trainer may train twice."""
    run = Run(RLVRProgress(), monkeypatch, terminal=False)
    for start in (1000.0, 2000.0):
        run.start()
        run.phase(start)
        run.phase(start + 1)  # comes too soon, so it is shown at the end
        run.end()
    assert [line[0] for line in run.lines()] == ["step", "2", "4", "step", "6", "8"]


def test_what_was_not_measured_is_a_dash(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(RLVRProgress(), monkeypatch, terminal=False)
    run.start()
    monkeypatch.delitem(METRICS, "credit/kept_fraction")
    run.phase(1000.0)
    assert run.lines()[1][5] == "–"


def test_the_live_table_shows_the_last_phases_and_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    """Headings, numbers, and the optimiser steps of all; older phases scroll out."""
    run = Run(RLVRProgress(rows=2), monkeypatch, terminal=True)
    run.start()
    for reward in (0.111, 0.222, 0.333):
        run.phase(run.now + 0.1, **{"rollout/reward": reward})
    run.end()
    frame = run.text()[run.text().rindex("reward") :]
    for heading in ("entropy", "kept", "tokens/s", "learn s"):
        assert heading in frame
    for number in ("0.222", "0.333", "1.2346", "20.0%", "12,346", "0.25", "6/10 optimiser steps"):
        assert number in frame
    assert "0.111" not in frame


def test_the_live_table_ends_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cursor comes back, and later prints stand on lines of their own."""
    run = Run(RLVRProgress(), monkeypatch, terminal=True)
    run.start()
    run.phase(1000.0)
    stream: Any = run.console.file
    assert "\x1b[?25l" in stream.getvalue()
    assert "\x1b[?25h" not in stream.getvalue()
    run.progress.on_exception(run.trainer, run.module, KeyboardInterrupt())
    assert stream.getvalue().count("\x1b[?25h") == 1
    run.end()
    assert stream.getvalue().count("\x1b[?25h") == 1


def test_training_without_an_end_has_a_bar_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """``max_steps: -1`` and epochs without a limit; with limited epochs their number of steps counts."""
    run = Run(RLVRProgress(), monkeypatch, terminal=True)
    run.trainer.max_steps = -1
    run.start()
    run.phase(1000.0)
    run.end()
    assert "2/? optimiser steps" in run.text()
    limited = Run(RLVRProgress(), monkeypatch, terminal=True)
    limited.trainer.estimated_stepping_batches = 8
    limited.start()
    limited.end()
    assert "0/8 optimiser steps" in limited.text()


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("silence", ["quiet", "disable", "rank"])
def test_quiet_runs_and_other_ranks_show_nothing(silence: str, terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    progress = RLVRProgress(quiet=silence == "quiet")
    if silence == "disable":
        progress.disable()
    run = Run(progress, monkeypatch, terminal, first=silence != "rank")
    run.trainer.callback_metrics = {"val/sampled/mean_at_1": torch.tensor(0.5)}
    run.start()
    run.phase(1000.0)
    progress.on_validation_end(run.trainer, run.module)
    run.end()
    stream: Any = run.console.file
    assert stream.getvalue() == ""


def test_enable_undoes_disable(monkeypatch: pytest.MonkeyPatch) -> None:
    progress = RLVRProgress()
    progress.disable()
    progress.enable()
    run = Run(progress, monkeypatch, terminal=False)
    run.start()
    run.phase(1000.0)
    assert len(run.lines()) == 2


def test_validation_is_one_line_of_accuracies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accuracies only; nothing for Lightning's sanity check, and nothing where there is nothing to say."""
    run = Run(RLVRProgress(), monkeypatch, terminal=False)
    run.start()
    run.progress.on_validation_end(run.trainer, run.module)
    run.trainer.global_step = 40
    run.trainer.callback_metrics = {
        "val/sampled/mean_at_4": torch.tensor(0.25), "val/sampled/pass_at_4": torch.tensor(0.5),
        "val/sampled/length": torch.tensor(9.0), "train/loss": torch.tensor(1.0),
    }  # fmt: skip
    run.trainer.sanity_checking = True
    run.progress.on_validation_end(run.trainer, run.module)
    assert run.text() == ""
    run.trainer.sanity_checking = False
    run.progress.on_validation_end(run.trainer, run.module)
    assert run.text() == "validation at step 40: sampled/mean_at_4 0.250, sampled/pass_at_4 0.500\n"


def test_the_time_of_learning_is_logged_by_a_quiet_run_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once per phase, as of its last optimiser step."""
    run = Run(RLVRProgress(quiet=True), monkeypatch, terminal=False)
    run.start()
    run.phase(1001.0)
    run.phase(1002.0)
    assert run.logged == [({"time/learn_s": 0.25}, 2), ({"time/learn_s": 0.25}, 4)]


@pytest.mark.parametrize("wrong", [{"rows": 0}, {"rows": -1}, {"interval": -1.0}, {"interval": float("nan")}])
def test_numbers_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"RLVRProgress.{next(iter(wrong))} must be at least"):
        RLVRProgress(**wrong)


@pytest.mark.parametrize("terminal", [True, False])
def test_diagnostics_stand_below_the_table_or_at_the_end(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the callbacks did in the phase, and what the last step says of learning."""
    run = Run(RLVRProgress(), monkeypatch, terminal)
    run.start()
    run.module.step_metrics = {"train/clip_low": 0.01, "train/ratio_max": 1.25, "train/lr": 0.1}
    changed: dict[str, Any] = {"credit/EntropyTopK/threshold": 0.5, "credit/entropy_negative": 0.75}
    run.phase(1000.0, **changed)
    run.end()
    shown = [line.strip() for line in run.text().splitlines()]
    for line in (
        "EntropyTopK  threshold 0.5",
        "samples  entropy_negative 0.75",
        "learning  clip_low 0.01, ratio_max 1.25",
    ):
        assert line in shown
    assert not any("lr" in line.split() for line in shown)
