"""``lit-rlvr doctor``: is this machine ready for a run? Every finding is a line that says what to do about it."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, packages_distributions, requires, version
from pathlib import Path
from unittest.mock import patch

import torch
from packaging.requirements import Requirement
from rich.console import Console
from rich.text import Text

from lit_rlvr.engines.vllm_local import check_vllm
from lit_rlvr.explain_memory import readable
from lit_rlvr.models import cache_folder
from lit_rlvr.terminal import quiet_libraries

FINE, WARNING, BROKEN = "✓", "!", "✗"
COLOURS = {FINE: "green", WARNING: "yellow", BROKEN: "red"}
SHOWN = ("torch", "lightning", "transformers", "mlflow")
LITTLE_SPACE = 5 * 2**30
DATABASE = "sqlite:///mlflow.db"
IMPATIENT = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "5"}
"""A tracking server that does not answer is asked for minutes otherwise."""


class Report:
    """Prints findings as they are made, and counts them."""

    def __init__(self) -> None:
        self.out = Console(highlight=False, soft_wrap=True)
        self.counts = dict.fromkeys(COLOURS, 0)
        self.about = ""

    @contextmanager
    def part(self, about: str) -> Iterator[None]:
        """What follows is about ``about``; an error in it is a finding too. ``LIT_RLVR_DEBUG=1`` raises it."""
        self.about = about
        try:
            yield
        except Exception as error:  # a doctor examines whatever there is, and examines on
            if os.environ.get("LIT_RLVR_DEBUG"):
                raise
            self.broken(str(error) or type(error).__name__)

    def fine(self, finding: str) -> None:
        """Nothing is to be done."""
        self._say(FINE, finding)

    def warning(self, finding: str, advice: str = "") -> None:
        """Worth a look; a run would start all the same."""
        self._say(WARNING, finding, advice)

    def broken(self, finding: str, advice: str = "") -> None:
        """A run would fail."""
        self._say(BROKEN, finding, advice)

    def close(self) -> int:
        """Print the sum and return the exit code: 1 when something is broken."""
        broken, warnings = self.counts[BROKEN], self.counts[WARNING]
        self.out.print(f"{broken} broken, {warnings} worth a look, {self.counts[FINE]} fine", style="bold")
        return int(broken > 0)

    def _say(self, mark: str, finding: str, advice: str = "") -> None:
        self.counts[mark] += 1
        finding = " ".join(finding.split())
        line = Text.assemble((mark, f"bold {COLOURS[mark]}"), f" {self.about:<14} {finding}")
        self.out.print(line + Text(f" → {advice}" if advice else ""))


class Notes(logging.Handler):
    """Makes findings of what the package logs as warnings."""

    def __init__(self, report: Report) -> None:
        super().__init__(logging.WARNING)
        self.report = report

    def emit(self, record: logging.LogRecord) -> None:
        self.report.warning(record.getMessage())


def main() -> int:
    """The command without a configuration: the machine alone."""
    quiet_libraries()
    report = Report()
    machine(report)
    places(report, Path(), default_database())
    return report.close()


def refused(sentence: str) -> int:
    """The command with a configuration that cannot be read: the machine, and why."""
    report = Report()
    machine(report)
    report.about = "configuration"
    report.broken(sentence)
    places(report, Path(), default_database())
    return report.close()


def machine(report: Report) -> None:
    """Python, packages and devices."""
    with report.part("packages"):
        packages(report)
    with report.part("devices"):
        devices(report)


def packages(report: Report) -> None:
    """Whether everything that the package needs is installed, in a version that it works with."""
    wrong = list(unmet("lit-rlvr"))
    for requirement, found in wrong:
        wanted = f"{requirement.name}{requirement.specifier}"
        report.broken(f"{requirement.name} {found or 'is missing'}", f"pip install '{wanted}'")
    if not wrong:
        shown = ", ".join(f"{name} {version(name)}" for name in SHOWN)
        report.fine(f"lit-rlvr {version('lit-rlvr')}, Python {sys.version.split()[0]}, {shown}")


def unmet(distribution: str) -> Iterator[tuple[Requirement, str]]:
    """What an installed package needs and has not: the requirement, and the version that is installed or nothing."""
    for requirement in map(Requirement, requires(distribution) or []):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            found = ""
        if not requirement.specifier.contains(found or "0", prereleases=True):
            yield requirement, found


def vllm(report: Report) -> None:
    """Whether this environment has a vLLM that goes with the packages that training uses too."""
    check_vllm()
    (distribution,) = set(packages_distributions()["vllm"])  # the CPU build has a name of its own
    wrong = [(requirement, found) for requirement, found in unmet(distribution) if requirement.name in SHOWN]
    for requirement, found in wrong:
        report.warning(
            f"{distribution} {version(distribution)} needs {requirement.name}{requirement.specifier}, and "
            f"{found or 'none'} is installed",
            f"pip install '{requirement.name}{requirement.specifier}', or VLLMColocatedEngine",
        )
    if not wrong:
        report.fine(f"{distribution} {version(distribution)}")


def devices(report: Report) -> None:
    """CPU, memory and GPUs."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    report.fine(f"CPU: {os.cpu_count()} cores, {torch.get_num_threads()} thread(s), {readable(memory)} memory")
    if not torch.cuda.is_available():
        report.fine(f"no CUDA device ({'torch is built for CUDA' if torch.version.cuda else 'torch is a CPU build'})")
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        finding = f"cuda:{index}: {torch.cuda.get_device_name(index)}, {readable(free)} of {readable(total)} free"
        if free < total / 2:
            report.warning(finding, "somebody else uses it: nvidia-smi shows who")
        else:
            report.fine(finding)


def places(report: Report, root: Path, database: str | None) -> None:
    """Where a run writes to: its folder, the cache and the tracking database (or None)."""
    for about, folder in (("run folder", root), ("cache", cache_folder())):
        with report.part(about):
            space(report, folder.absolute())
    with report.part("tracking"):
        if database is None:
            report.fine("no MLflow logger")
        else:
            tracking(report, database)


def space(report: Report, folder: Path) -> None:
    """Whether ``folder`` can be written to, and how much fits."""
    there = next(place for place in (folder, *folder.parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        report.broken(f"{there} cannot be written to", "choose another folder, or change its permissions")
        return
    free = shutil.disk_usage(there).free
    finding = f"{folder}: {readable(free)} free"
    if free < LITTLE_SPACE:
        report.warning(finding, "a checkpoint takes three times the model's float32 weights, or more")
    else:
        report.fine(finding)


def default_database() -> str:
    """Where MLflow keeps runs when nothing else is said."""
    return os.environ.get("MLFLOW_TRACKING_URI") or DATABASE


def tracking(report: Report, database: str) -> None:
    """Open MLflow's database, which is made on first use."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    from lit_rlvr.tracking import anchored

    try:
        with patch.dict(os.environ, IMPATIENT):
            count = len(MlflowClient(anchored(database)).search_experiments())
    except MlflowException as error:
        report.broken(
            f"MLflow cannot open {database}: {str(error)[:160]}",
            "set trainer.logger.init_args.tracking_uri, or add --config configs/logger/none.yaml",
        )
        return
    report.fine(f"MLflow opens {database}, which has {count} experiment(s)")
