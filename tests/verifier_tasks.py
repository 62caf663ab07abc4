"""Tasks with verifiers that misbehave, in a module that the pool's processes can import."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_rlvr.tasks import Prompt, Score, Split, Task


class OddError(Exception):
    """Cannot be unpickled: its constructor wants two arguments and its state holds one."""

    def __init__(self, what: str, where: str) -> None:
        super().__init__(f"{what} at {where}")


class Misbehaving(Task):
    """Does what the response says; the answer is the process that judged it, or the response."""

    def prompts(self, split: Split) -> Sequence[Prompt]:
        return [Prompt(0, "?")]

    def score(self, prompt: Prompt, response: str) -> Score:
        what, _, more = response.partition(" ")
        odd: dict[str, Any] = {"none": None, "number": 1.0, "text": Score("1", True)}  # type: ignore[arg-type]
        if what in odd:
            wrong: Score = odd[what]
            return wrong
        if what == "reward":
            return Score(float(more), True)
        if what == "sleep":
            time.sleep(float(more))
        elif what == "hang":
            self._hang(more)
        elif what == "die":
            os._exit(3)
        elif what == "terminated" and not Path(more).exists():
            Path(more).touch()
            os.kill(os.getpid(), signal.SIGTERM)
        elif what == "warned":
            os.kill(os.getpid(), signal.SIGUSR1)
        elif what == "exit":
            sys.exit(3)
        elif what == "raise":
            raise ValueError(f"cannot\nread {more}")
        elif what == "odd":
            raise OddError("nothing", "all")
        elif what == "pid":
            return Score(1.0, True, str(os.getpid()))
        return Score(0.5, True, response)

    def _hang(self, note: str) -> None:
        """For ever, after writing down the process; a polite request to end is ignored."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        Path(note).write_text(str(os.getpid()))
        while True:
            time.sleep(1)


class Trusted(Misbehaving):
    """The same in this process."""

    isolated = False
