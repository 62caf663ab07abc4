"""Starting vLLM servers with what the engine needs: ``lit-rlvr serve``, and servers of a run's own."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from lit_rlvr.engines.vllm_client import RECEIVER, SUPPORTED

SERVER_SIDE = Path(__file__).parent / "server_side"
END_WITH_PARENT = Path(__file__).parent / "end_with_parent.py"

PLACE = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_")
"""How names of environment variables begin that tell a process its place among others.

A server's own processes meet elsewhere, and would wait for ever at the store that ``torchrun`` made.
"""

HOW_TO_INSTALL = (
    "give vLLM an environment of its own (python3.11 -m venv .vllm-env, then .vllm-env/bin/pip install "
    f"'vllm{SUPPORTED}') and name that one's bin/python"
)

PYTHON_SECONDS = 120.0
"""How long another environment's Python may take to look for vLLM."""

USAGE = "lit-rlvr serve MODEL [--python PYTHON] [--host HOST] [--port PORT] [vLLM options]"

DESCRIPTION = f"""Start a vLLM server that a run can push weights to. It has an environment of its own:

  python3.11 -m venv .vllm-env
  .vllm-env/bin/pip install 'vllm{SUPPORTED}'
  lit-rlvr serve Qwen/Qwen3-8B-Base --python .vllm-env/bin/python

Whoever reaches the server's port can replace its weights and have it read files: keep it on a private network.
"""


def server_command(python: str, model: str, host: str, port: int, options: Sequence[str]) -> list[str]:
    """The command that starts a server; see :func:`server_environment`.

    The module rather than the command ``vllm``, which the CPU build installs under a name that it does not know itself.
    """
    return [
        python, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--host", host, "--port", str(port),
        "--logprobs-mode", "processed_logprobs", "--enable-scale-out", "--worker-extension-cls", RECEIVER, *options,
    ]  # fmt: skip


def server_environment() -> dict[str, str]:
    """This process's environment, with what lets a server take weights in, and without its place in a run."""
    path = os.pathsep.join([str(SERVER_SIDE), *filter(None, [os.environ.get("PYTHONPATH")])])
    kept = {name: value for name, value in os.environ.items() if not name.startswith(PLACE)}
    return {**kept, "VLLM_SERVER_DEV_MODE": "1", "PYTHONPATH": path}


def check_python(python: str) -> None:
    """Refuse an environment without vLLM.

    Raises:
        ValueError: Saying how to make one, or that the environment does not answer.
    """
    test = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    try:
        found = subprocess.run([python, "-c", test], check=False, timeout=PYTHON_SECONDS).returncode == 0
    except OSError:
        raise ValueError(f"there is no Python at {python}; {HOW_TO_INSTALL}") from None
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"{python} did not start within {PYTHON_SECONDS:g} seconds; is its environment on a slow filesystem? Try "
            "again, or put the environment on a local disk"
        ) from None
    if not found:
        raise ValueError(f"there is no vLLM in the environment of {python}; {HOW_TO_INSTALL}")


class ServerProcess:
    """A vLLM server in a process of its own, which ends with :meth:`stop`, and on Linux with the thread that made it.

    Args:
        command: What starts it.
        environment: Its environment variables.
        address: Where it will answer.
        output: The file that its output goes to.
    """

    def __init__(self, command: Sequence[str], environment: dict[str, str], address: str, output: Path) -> None:
        self.address, self.output = address, output
        launched = [sys.executable, str(END_WITH_PARENT), str(os.getpid()), *command]
        with output.open("wb") as out:
            self.process = subprocess.Popen(
                launched, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
            )

    def wait_until_ready(self, seconds: float) -> None:
        """Return once the server answers.

        Raises:
            RuntimeError: When it ended, or did not answer in time; with the last lines that it wrote.
        """
        import requests

        session, deadline = requests.Session(), time.monotonic() + seconds
        session.trust_env = False  # a proxy for the internet does not lead to a server beside us
        while time.monotonic() < deadline:
            if (code := self.process.poll()) is not None:
                raise RuntimeError(f"the vLLM server ended with exit code {code} as it started:\n{self._last_lines()}")
            try:
                if session.get(f"{self.address}/health", timeout=5).ok:
                    return
            except requests.RequestException:
                pass
            time.sleep(0.5)
        raise RuntimeError(f"the vLLM server did not answer within {seconds:g} seconds:\n{self._last_lines()}")

    def _last_lines(self) -> str:
        return "\n".join(self.output.read_text(errors="replace").splitlines()[-8:])

    def stop(self) -> None:
        """End the server and all of its own processes."""
        for kill, seconds in ((15, 20.0), (9, 20.0)):
            try:
                os.killpg(self.process.pid, kill)
                self.process.wait(seconds)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue


def main(arguments: Sequence[str]) -> int:
    """The ``serve`` command: this process becomes the server."""
    parser = argparse.ArgumentParser(
        "lit-rlvr serve",
        usage=USAGE,
        description=DESCRIPTION,
        epilog="Other options are vLLM's own, such as --tensor-parallel-size 2 or --max-model-len 9000.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="the run's model.model: a folder, hub name or built-in model")
    parser.add_argument("--python", default=sys.executable, help="Python of the environment that has vLLM")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s)")
    parser.add_argument("--port", default=8000, type=int, help="port to listen at (default: %(default)s)")
    given, options = parser.parse_known_args(arguments)
    from lit_rlvr.models import resolve_model

    try:
        check_python(given.python)
        model = resolve_model(given.model)
    except ValueError as error:
        print(f"lit-rlvr: error: {error}", file=sys.stderr)
        return 2
    command = server_command(given.python, model, given.host, given.port, options)
    return os.execvpe(command[0], command, server_environment())
