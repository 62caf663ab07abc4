"""``end_with_parent.py PARENT PROGRAM ...`` becomes another program, which ends when the process PARENT does.

A file of its own without other imports, because it is run by path before every server. Elsewhere than on Linux it only
becomes the program.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Have the kernel end us with the parent, whatever that dies of, and start the program."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != int(sys.argv[1]):  # it has died already
            sys.exit(1)
    os.execvp(sys.argv[2], sys.argv[2:])


if __name__ == "__main__":
    main()
