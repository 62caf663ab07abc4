"""Stands in for ``lit-rlvr fit``: writes in milliseconds what a run leaves.

Options of its own: ``fake.level``, the held-out result with seed 0; ``fake.code``, to end with it, without
a report; ``fake.fail_seed``, to do so with one seed only; ``fake.wait``, to wait for a file; ``fake.gate_at``, to make
that file as soon as so many runs have begun.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

options = dict(word.removeprefix("--").split("=", 1) for word in sys.argv[1:] if "=" in word)
folder, seed = Path(options.get("trainer.default_root_dir", ".")).resolve(), options.get("seed_everything", "0")
ORDER = folder.parents[1] / "order.txt"


def note(event: str) -> None:
    """Append to the file that tells in which order things happened."""
    with ORDER.open("a") as order:
        order.write(f"{event} {folder.parent.name.rpartition('-')[0]} {seed} {os.getpid()}\n")


def wait(gate: Path) -> None:
    """Until there is a gate."""
    deadline = time.monotonic() + 120
    while not gate.exists() and time.monotonic() < deadline:
        if ORDER.read_text().count("begin") >= int(options.get("fake.gate_at", "1000")):
            gate.touch()
        time.sleep(0.01)


def leave_results() -> None:
    """Report and metrics."""
    level = float(options.get("fake.level", "0.5"))
    value = level + int(seed) * level / 50
    report = {"evaluations": {"before training": {}, "after RLVR": {"sampled/mean_at_1": value, "sampled/length": 28}}}
    (folder / "metrics").mkdir()
    rows = [f"{step},{value * step / 10},{'' if step % 2 else 0.5}" for step in range(1, 11)]
    (folder / "metrics/metrics.csv").write_text("\n".join(["step,rollout/reward,train/entropy", *rows]) + "\n")
    (folder / "report.json").write_text(json.dumps(report))


def main() -> None:
    """Run as the options say."""
    note("begin")
    if "fake.wait" in options:
        wait(Path(options["fake.wait"]))
    if "fake.code" in options and options.get("fake.fail_seed", seed) == seed:
        print("\n".join(f"line {n}" for n in range(30)))
        print("lit-rlvr: error: the fake run was told to fail")
        sys.exit(int(options["fake.code"]))
    print(f"OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']}")
    print(options["trainer.logger"])
    leave_results()
    note("end")


if __name__ == "__main__":
    main()
