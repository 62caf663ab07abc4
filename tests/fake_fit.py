"""Stands in for ``lit-rlvr fit``: writes in milliseconds what a run leaves.

Options of its own: ``--fake.level`` is the held-out result without the seed's share; ``--fake.code`` ends with that
code, ``--fake.fail_seed`` only in the run with that seed; ``--fake.wait`` waits until that file exists.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path


def main() -> None:
    options = {name: value for name, _, value in (word.partition("=") for word in sys.argv[1:])}
    folder, seed = Path(options["--trainer.default_root_dir"]), int(options["--seed_everything"])
    with (folder.parents[1] / "order.txt").open("a") as order:
        order.write(f"begin {folder.parent.name.rpartition('-')[0]} {seed} {os.getpid()}\n")
    if wait := options.get("--fake.wait"):
        until = time.monotonic() + 60
        while not Path(wait).exists() and time.monotonic() < until:
            time.sleep(0.01)
    if options.get("--fake.fail_seed", str(seed)) == str(seed) and "--fake.code" in options:
        print("\n".join(f"line {n}" for n in range(30)))
        print("lit-rlvr: error: the fake run was told to fail")
        sys.exit(int(options["--fake.code"]))
    value = float(options.get("--fake.level", "0.5")) + seed / 100
    report = {"evaluations": {"before training": {}, "after RLVR": {"sampled/mean_at_1": value, "sampled/length": 28}}}
    (folder / "metrics").mkdir()
    rows = [f"{step},{value * step / 10},{'' if step % 2 else 0.5}" for step in range(1, 11)]
    (folder / "metrics/metrics.csv").write_text("\n".join(["step,rollout/reward,train/entropy", *rows]) + "\n")
    (folder / "report.json").write_text(json.dumps(report))
    with (folder.parents[1] / "order.txt").open("a") as order:
        order.write(f"end {folder.parent.name.rpartition('-')[0]} {seed} {os.getpid()}\n")


main()
