"""``python -m benchmarks step --size S``: one JSON line per result."""

from __future__ import annotations

import argparse

from benchmarks import step
from benchmarks.models import SIZES

SIDES = ("lit-rlvr", "lit-rlvr, all tokens", "TRL", "TRL tuned", "TRL, checkpointing")


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=step.__doc__)
    parser.add_argument("benchmark", choices=["step"], help="a whole RLVR step, and its two parts")
    parser.add_argument("--size", choices=[*SIZES], default="S", help="model and work of a step")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repeats", type=int, default=5, help="rounds that count; one more goes before")
    parser.add_argument("--ends", type=int, default=0, help="tokens that end a response, for ragged lengths")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES[:4]), help="ours first")
    given = parser.parse_args()
    step.main(given.size, given.device, given.repeats, given.sides, given.ends)


if __name__ == "__main__":
    main()
