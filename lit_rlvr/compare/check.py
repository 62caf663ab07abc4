"""Whether ``lit-rlvr fit`` understands every arm, found out in one process before the first run begins."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO

from lit_rlvr.compare.runs import Run

ERROR = "lit-rlvr: error: "


def check_arms(runs: Sequence[Run]) -> None:
    """Refuse arms that could not begin.

    Raises:
        ValueError: With each arm's name and error.
    """
    arms = {run.arm: list(run.arguments) for run in reversed(runs)}
    command = [sys.executable, "-m", "lit_rlvr.compare.check"]
    done = subprocess.run(command, input=json.dumps(arms), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the arms could not be checked:\n{done.stderr}")
    broken: Mapping[str, str] = json.loads(done.stdout)
    if broken:
        raise ValueError(
            "\n".join(f"arm {arm}: {broken[arm]}" for arm in dict.fromkeys(run.arm for run in runs) if arm in broken)
        )


def wrong_with(arguments: Sequence[str]) -> str | None:
    """What ``fit`` would refuse about ``arguments``, without loading a model or opening a logger; None: nothing."""
    from lit_rlvr.cli import CheckOnly, run

    said = StringIO()
    with redirect_stdout(StringIO()), redirect_stderr(said):
        try:
            code: object = run(["fit", *arguments, "--trainer.logger=false"], CheckOnly)
        except SystemExit as end:
            code = end.code
    return said.getvalue().rpartition(ERROR)[2].strip() if code else None


def main() -> None:
    """Read the arguments of arms by name from standard input, and print what is wrong with which."""
    arms = json.load(sys.stdin)
    print(json.dumps({arm: said for arm, arguments in arms.items() if (said := wrong_with(arguments)) is not None}))


if __name__ == "__main__":
    main()
