"""What ``lit-rlvr fit`` would refuse about the arguments of arms; a process of its own, because it imports torch."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO

from lit_rlvr.checks import check_chain, check_trainer
from lit_rlvr.cli import CLI, run

ERROR = "lit-rlvr: error: "


class CheckOnly(CLI):
    """``fit`` up to where it would begin."""

    def _run_subcommand(self, subcommand: str) -> None:
        module, _, trainer = self._connected()
        check_trainer(module, trainer)
        check_chain(module)


def wrong_with(arguments: Sequence[str]) -> str | None:
    """What ``fit`` would refuse about ``arguments``, without loading a model or opening a logger; None: nothing."""
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
