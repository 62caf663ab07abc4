"""Sampling from vLLM servers that a run starts for itself, one beside each rank."""

from __future__ import annotations

import atexit
import logging
import os
import socket
import tempfile
from pathlib import Path

from lit_rlvr.engines.vllm_engine import VLLMEngine
from lit_rlvr.engines.vllm_launch import ServerProcess, check_python, server_command, server_environment
from lit_rlvr.policy import Policy
from lit_rlvr.reduce import Reduce

log = logging.getLogger(__name__)

HOST = "127.0.0.1"


class VLLMColocatedEngine(VLLMEngine):
    """Starts a vLLM server beside every rank, on the rank's own device, and samples from it.

    vLLM needs other versions of some packages than training does, so it runs in a process and a Python environment of
    its own; ``sleep_level`` lets training have the device's memory while the policy learns. All ranks run on one
    machine; for several, start servers with ``lit-rlvr serve`` and use ``VLLMServerEngine``.

    Args:
        python: Python of the environment that has vLLM, as in ``.vllm-env/bin/python``.
        options: vLLM's own options, as in ``[--gpu-memory-utilization=0.4, --max-model-len=9000]``.
        start_seconds: How long a server may take to start.
        folder: Where weights wait to be loaded, a file at a time. Null: memory shared on this machine.
        file_megabytes: Size of a file of weights: what a push takes beside the copies of the policy.
        timeout: Seconds that a request may take, whether it samples or loads.
        retries: How often a request is repeated when a server does not answer, or fails.
        requests: Most prompts that are sampled at a time on one server.
        sleep_level: 0: servers keep their memory while the policy learns. 1: they give up the cache, and move weights
            to the host's memory. 2: they give up both, because weights are pushed again anyway.

    Raises:
        ValueError: For an option out of range.
    """

    def __init__(
        self,
        python: str,
        options: list[str] | None = None,
        start_seconds: float = 1800.0,
        folder: str | None = None,
        file_megabytes: int = 512,
        timeout: float = 1800.0,
        retries: int = 3,
        requests: int = 128,
        sleep_level: int = 0,
    ) -> None:
        super().__init__(folder, file_megabytes, timeout, retries, requests, sleep_level)
        if start_seconds <= 0:
            raise ValueError(f"engine.start_seconds must be above 0, got {start_seconds}")
        self.python, self.options, self.start_seconds = python, list(options or []), start_seconds
        self.process: ServerProcess | None = None

    def check_overlap(self) -> None:
        raise ValueError(
            "model.overlap needs servers with devices of their own, and those of VLLMColocatedEngine share them with "
            "training; start servers with lit-rlvr serve and use VLLMServerEngine"
        )

    def start(self, policy: Policy, reduce: Reduce) -> None:
        """Start this rank's server, and tell the others where it is.

        Raises:
            ValueError: When ranks run on several machines, or there is no vLLM.
            RuntimeError: On every rank, when a server did not start.
        """
        hosts = set(reduce.gather(socket.gethostname()))
        if len(hosts) > 1:
            raise ValueError(
                f"VLLMColocatedEngine works on one machine, and the run has {len(hosts)}; start servers with lit-rlvr "
                "serve and use VLLMServerEngine"
            )
        problem: Exception | None = None
        try:
            self._start_own(policy)
        except (ValueError, RuntimeError) as error:
            problem = error
        said = reduce.gather((None if self.process is None else self.process.address, problem and str(problem)))
        if failed := [text for _, text in said if text]:
            self.close()
            raise problem or RuntimeError(failed[0])
        self.connect([address for address, _ in said])
        self.meet()

    def _start_own(self, policy: Policy) -> None:
        check_python(self.python)
        port, environment = free_port(), server_environment()
        if policy.device.type == "cuda":
            visible = [*filter(None, os.environ.get("CUDA_VISIBLE_DEVICES", "").split(","))]
            environment["CUDA_VISIBLE_DEVICES"] = visible[policy.device.index] if visible else str(policy.device.index)
        options = [*self.options, *(["--enable-sleep-mode"] if self.sleep_level else [])]
        command = server_command(self.python, str(policy.hf.config.name_or_path), HOST, port, options)
        output = Path(tempfile.mkdtemp(prefix="lit-rlvr-vllm-")) / "server.log"
        log.info("starting a vLLM server; its output goes to %s", output)
        self.process = ServerProcess(command, environment, f"http://{HOST}:{port}", output)
        atexit.register(self.process.stop)
        self.process.wait_until_ready(self.start_seconds)

    def close(self) -> None:
        super().close()
        if self.process is not None:
            self.process.stop()
            atexit.unregister(self.process.stop)
            self.process = None
        self.clients, self._asleep = [], False


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        port: int = listener.getsockname()[1]
        return port
