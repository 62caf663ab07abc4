"""Whether ``lit-rlvr fit`` understands every arm, found out in one process before the first run begins."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence

from lit_rlvr.compare.runs import Run


def check_arms(runs: Sequence[Run]) -> None:
    """Refuse arms that could not begin.

    Raises:
        ValueError: With each arm's name and error.
    """
    arms = {run.arm: list(run.arguments) for run in reversed(runs)}
    command = [sys.executable, "-m", "lit_rlvr.compare.refused"]
    done = subprocess.run(command, input=json.dumps(arms), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the arms could not be checked:\n{done.stderr}")
    broken: Mapping[str, str] = json.loads(done.stdout)
    if broken:
        raise ValueError(
            "\n".join(f"arm {arm}: {broken[arm]}" for arm in dict.fromkeys(run.arm for run in runs) if arm in broken)
        )
