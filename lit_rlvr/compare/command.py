"""The command ``lit-rlvr compare``."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from lit_rlvr.compare.measures import Result, read_result
from lit_rlvr.compare.runs import Run, runs_of
from lit_rlvr.compare.spec import Comparison, read
from lit_rlvr.near import did_you_mean

FIT = (sys.executable, "-m", "lit_rlvr", "fit")
DESCRIPTION = """Run arms with several seeds each, and compare them: means, paired differences with confidence
intervals, verdicts in words, and learning curves. What is done already is not run again."""


class Parser(argparse.ArgumentParser):
    """Errors in the words of the other commands."""

    def error(self, message: str) -> NoReturn:
        fail(message)
        sys.exit(2)


def parser() -> Parser:
    """The command's options."""
    options = Parser(prog="lit-rlvr compare", description=DESCRIPTION, allow_abbrev=False)
    options.add_argument("--config", required=True, type=Path, metavar="FILE", help="the comparison (docs/compare.md)")
    options.add_argument("--dry_run", action="store_true", help="print what would be run, and stop")
    options.add_argument("--table_only", action="store_true", help="run nothing; make the table of what is done")
    options.add_argument("--workers", type=_number, help="runs at the same time; default: cores / threads of a run")
    options.add_argument("--arms", type=_words, help="only these, for example --arms=all,top20; with the baseline")
    options.add_argument("--seeds", type=_numbers, help="instead of the file's, for example --seeds=0,1")
    options.add_argument("--folder", type=Path, help="where runs and tables are kept; default: runs/compare/NAME")
    return options


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.strip("[] ").split(",") if word.strip()]


def _number(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}")
    return int(text)


def _numbers(text: str) -> list[int]:
    words = _words(text)
    if not all(word.isdecimal() for word in words):
        raise argparse.ArgumentTypeError(f"expected whole numbers separated by commas, got {text!r}")
    return list(map(int, words))


def fail(sentence: str) -> None:
    """Print an error."""
    say(f"lit-rlvr: error: {sentence}")


def say(line: str) -> None:
    """Print about progress; standard output stays for the table."""
    print(line, file=sys.stderr, flush=True)


def main(arguments: Sequence[str], program: Sequence[str] = FIT) -> int:
    """Run the command.

    Args:
        arguments: Its options.
        program: What runs one arm with one seed, followed by the arguments of ``lit-rlvr fit``.

    Returns:
        0; 1 when a run has failed; 2 for a mistake of the user; 130 when interrupted.
    """
    options_parser = parser()
    options, unknown = options_parser.parse_known_args(list(arguments))
    if unknown:
        known = [name for action in options_parser._actions for name in action.option_strings]
        options_parser.error(f"there is no option {unknown[0]!r}{did_you_mean(unknown[0].split('=')[0], known)}")
    try:
        comparison = read(options.config).only(options.arms, options.seeds)
        changed = {name: getattr(options, name) for name in ("workers", "folder")}
        comparison = replace(comparison, **{name: value for name, value in changed.items() if value is not None})
        if not options.table_only and tuple(program) == FIT:  # what another program takes is its own affair
            check(comparison)
        if options.dry_run:
            show(comparison, program)
            return 0
        return compare(comparison, program, shlex.join(["lit-rlvr", "compare", *arguments]), options.table_only)
    except ValueError as error:
        if os.environ.get("LIT_RLVR_DEBUG"):
            raise
        fail(str(error))
        return 2


def check(comparison: Comparison) -> None:
    """Refuse arms that could not begin, if any of their runs is still to be run.

    Raises:
        ValueError: With each arm's name and error.
    """
    from lit_rlvr.compare.check import check_arms

    if todo := [run for run in runs_of(comparison) if run.state() != "done"]:
        say(f"checking {len({run.arm for run in todo})} arms")
        check_arms(todo)


def workers_of(comparison: Comparison) -> int:
    """Runs at the same time."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return comparison.workers or max(1, cores // comparison.threads)


def show(comparison: Comparison, program: Sequence[str]) -> None:
    """Print each run's state and command."""
    runs = runs_of(comparison)
    for run in runs:
        print(f"# {run}: {run.state()}\n{shlex.join(run.command(program))}")
    done = sum(run.state() == "done" for run in runs)
    print(f"# {len(runs)} runs, {done} done, {len(runs) - done} to run, {workers_of(comparison)} at a time")


def compare(comparison: Comparison, program: Sequence[str], command: str, table_only: bool) -> int:
    """Run what is not done, and make the table."""
    from lit_rlvr.compare.pool import interruptible, locked

    with locked(comparison.folder) as lock, interruptible():
        from lit_rlvr.terminal import quiet_libraries

        quiet_libraries()
        runs = runs_of(comparison)
        record = open_record(comparison)
        status = "KILLED"
        try:
            if not table_only:
                work(comparison, runs, program, record, lock)
            text = write(comparison, runs, command, record)
            status = "FAILED" if any(run.state() == "failed" for run in runs) else "FINISHED"
        except KeyboardInterrupt:
            done = sum(run.state() == "done" for run in runs)
            say(f"stopped; {done} of {len(runs)} runs are done, and the same command goes on from there")
            return 130
        finally:
            if record is not None:
                record.close(status)
    print(text)
    say(f"kept in {comparison.folder}: table.md, table.csv, table.json and curve_*.png")
    return int(any(run.state() == "failed" for run in runs))


def open_record(comparison: Comparison) -> Any:
    """The comparison's record in MLflow; None without tracking.

    Raises:
        ValueError: When MLflow does not work.
    """
    if not comparison.track:
        return None
    from mlflow.exceptions import MlflowException

    from lit_rlvr.compare.record import Record

    try:
        return Record(comparison)
    except MlflowException as error:
        raise ValueError(f"MLflow does not work; `track: false` does without it: {error}") from error


def work(comparison: Comparison, runs: Sequence[Run], program: Sequence[str], record: Any, lock: int) -> None:
    """Run what is not done."""
    from lit_rlvr.compare.pool import Pool

    todo = [run for run in runs if run.state() != "done"]
    workers = workers_of(comparison)
    say(f"{len(runs)} runs, {len(runs) - len(todo)} done, {len(todo)} to run, {workers} at a time")
    left = len(todo)

    def command(run: Run) -> list[str]:
        return run.command(program, None if record is None else record.begin(run))

    def ended(run: Run) -> None:
        nonlocal left
        left -= 1
        if record is not None:
            record.end(run)
        say(f"{run}: {outcome(comparison, run)}; {left} to go")

    Pool(workers, comparison.threads, lock).work(todo, command, ended)


def outcome(comparison: Comparison, run: Run) -> str:
    """How a run ended, in a few words."""
    if run.state() == "failed":
        last = run.last_lines()
        return f"failed, see {run.log}" + (f": {last[-1]}" if last else "")
    measure = comparison.metric
    value = measure.value(read_result(run.folder))
    return f"{measure.name} is missing" if value is None else f"{measure.name} {value:.3f}"


def results_of(runs: Sequence[Run]) -> dict[str, dict[int, Result]]:
    """What the finished runs have left, by arm and seed."""
    found: dict[str, dict[int, Result]] = {run.arm: {} for run in runs}
    for run in runs:
        if run.state() == "done":
            found[run.arm][run.seed] = read_result(run.folder)
    return found


def write(comparison: Comparison, runs: Sequence[Run], command: str, record: Any) -> str:
    """Write tables and curves, keep them with the MLflow run, and return the Markdown."""
    from lit_rlvr.compare.plot import file_name, plot
    from lit_rlvr.compare.table import make_table, markdown, to_csv, to_json

    results, folder = results_of(runs), comparison.folder
    table = make_table(comparison, runs, results, command)
    text = markdown(table)
    texts = {"table.md": text, "table.csv": to_csv(table), "table.json": json.dumps(to_json(table), indent=2) + "\n"}
    for name, content in texts.items():
        (folder / name).write_text(content, encoding="utf-8")
    files = [folder / name for name in texts]
    histories = {arm: [result.history for result in by_seed.values()] for arm, by_seed in results.items()}
    for metric in comparison.curves:
        file = folder / file_name(metric)
        if plot(file, metric, histories, comparison.baseline):
            files.append(file)
        else:
            known = {name for runs_ in histories.values() for history in runs_ for name in history}
            say(f"no run has logged {metric!r}, so there is no curve of it{did_you_mean(metric, known)}")
    if record is not None:
        record.results(table, files)
    return text
