"""``python -m benchmarks BENCHMARK``: one JSON line per result."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch

import benchmarks.cluster
import benchmarks.floors
import benchmarks.head
import benchmarks.memory
import benchmarks.scaling
import benchmarks.step
import benchmarks.suite
import benchmarks.table
import benchmarks.tune
from benchmarks.ceilings import measured
from benchmarks.models import SIZES
from benchmarks.settings import Settings
from benchmarks.step import SIDES, Asked


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m benchmarks", description="Measurements, one JSON line per result.")
    commands = top.add_subparsers(dest="benchmark", required=True)

    def add(name: str, run: Callable[[Any], Any], about: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=about, description=about)
        command.set_defaults(run=run)
        return command

    everything = add("all", every, "every benchmark, one by one")
    everything.add_argument("--sizes", nargs="+", choices=[*benchmarks.suite.ROUNDS], default=[], help="else all")
    everything.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    everything.add_argument("--quick", action="store_true", help="a tiny model and one round: do the benchmarks work?")

    for name, about in (
        ("step", "a whole RLVR step against TRL, its two parts, and the floor"),
        ("rollout", "rollouts alone against TRL's"),
        ("train", "loss, backward pass and optimizer on responses that are there already, against TRL"),
    ):
        command = sized(add(name, lambda given: benchmarks.step.main(asked(given)), about))
        command.add_argument("--sides", nargs="+", choices=SIDES, default=[], help="ours first")
        command.add_argument("--ends", type=int, default=0, help="tokens that end a response, for ragged lengths")
        command.add_argument(
            "--select", choices=["random", "top"], default="random", help="which tokens ours learns from"
        )
        command.add_argument("--trl", type=json.loads, default={}, help='as JSON: options of "TRL tuned"')
        options(command)

    head = add("head", through_head, "ways through the language-model head")
    head.add_argument("--roads", nargs="+", choices=[*benchmarks.head.ROADS], default=["full", "chunked", "selected"])
    head.add_argument("--work", choices=[*benchmarks.head.WORK], default="49k", help="vocabulary")
    head.add_argument("--rho", type=float, default=0.2, help="share of tokens that learn")
    repeated(head)

    scaling = sized(add("scaling", scale, "our training's cost in tokens and in the share that learns"))
    scaling.add_argument("--of", nargs="+", choices=["length", "rows", "rho"], default=["length", "rows", "rho"])
    scaling.add_argument("--longest", type=int, default=1024, help="longest responses of 'length'")
    options(scaling)

    floors = sized(add("floors", floor, "the machine's ceilings, and the least that a step could cost"))
    floors.add_argument("--rho", type=float, default=0.2, help="share of tokens that learn")
    sized(add("memory", lambda given: benchmarks.memory.main(given.size, given.device), "explain's estimate of memory"))
    cluster = sized(add("cluster", lambda given: benchmarks.cluster.main(asked(given)), "explain's estimate of time"))
    cluster.set_defaults(sides=list(SIDES[:2]), ends=0, select="random", trl={})
    options(cluster)
    sized(add("tune", lambda given: benchmarks.tune.main(given.size, given.device, given.repeats), "TRL's options"))
    table = add("table", lambda given: benchmarks.table.main(given.files, given.into), "Markdown tables of JSON lines")
    table.add_argument("files", nargs="+")
    table.add_argument("--into", help="a page to put them into, between its markers")
    return top


def sized(command: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Options of a benchmark on a model."""
    command.add_argument("--size", choices=[*SIZES], default="S", help="model and work of a step")
    return repeated(command)


def repeated(command: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Options of every measurement."""
    command.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    command.add_argument("--repeats", type=int, default=5, help="rounds that count; one more goes before")
    return command


def options(command: argparse.ArgumentParser) -> None:
    """More options of our side."""
    command.add_argument(
        "--batch", type=json.loads, default={}, help='as JSON: more of model.batch, {"layout": "packed"}'
    )
    command.add_argument("--engine", type=json.loads, default={}, help="as JSON: more of the engine's options")


def asked(given: argparse.Namespace) -> Asked:
    """What a comparison is of."""
    work: Any = "step" if given.benchmark == "cluster" else given.benchmark
    try:
        return Asked(
            work, given.size, given.device, given.repeats, tuple(given.sides), given.ends, given.select, given.batch,
            given.engine, given.trl,
        ).checked()  # fmt: skip
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error


def every(given: argparse.Namespace) -> None:
    """Run ``all``."""
    if given.quick and given.sizes:
        raise SystemExit("error: --quick runs a tiny model; leave out --sizes")
    try:
        sizes = benchmarks.suite.chosen(given.sizes, given.device)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    benchmarks.suite.main(sizes, given.device, given.quick)


def through_head(given: argparse.Namespace) -> None:
    """Run ``head``."""
    benchmarks.head.main(given.work, given.device, given.repeats, given.rho, given.roads)


def scale(given: argparse.Namespace) -> None:
    """Run ``scaling``."""
    benchmarks.scaling.main(given.size, given.device, given.repeats, given.of, given.batch, given.longest)


def floor(given: argparse.Namespace) -> None:
    """Run ``floors``."""
    size = SIZES[given.size]
    benchmarks.floors.main(given.size, Settings("", size, given.device, rho=given.rho), measured(size, given.device))


def main() -> None:
    """Parse the command line and run."""
    given = parser().parse_args()
    if getattr(given, "repeats", 1) < 1:
        raise SystemExit("--repeats must be at least 1")
    if getattr(given, "device", "cpu") == "cuda" and not torch.cuda.is_available():
        raise SystemExit("error: --device cuda: PyTorch sees no GPU here")
    given.run(given)


if __name__ == "__main__":
    main()
