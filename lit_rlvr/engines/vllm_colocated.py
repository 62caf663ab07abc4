"""Sampling from vLLM servers that a run starts for itself, beside its ranks."""

from __future__ import annotations

import atexit
import logging
import os
import socket
import tempfile
from pathlib import Path

import torch

from lit_rlvr.engines.vllm_client import Served, VLLMClient
from lit_rlvr.engines.vllm_engine import VLLMEngine
from lit_rlvr.engines.vllm_launch import ServerProcess, check_python, server_command, server_environment
from lit_rlvr.policy import Policy
from lit_rlvr.reduce import Reduce, on_every_rank

log = logging.getLogger(__name__)

HOST = "127.0.0.1"

PARALLEL = ("--tensor-parallel-size", "-tp")
"""vLLM's option for the number of devices that a model is spread over."""


class VLLMColocatedEngine(VLLMEngine):
    """Starts a vLLM server beside every rank, or every few ranks, on their own devices, and samples from it.

    vLLM may run with other versions of some packages than training, in a process and a Python environment of its own;
    ``sleep_level`` lets training have the devices' memory while the policy learns. On several machines each has its own
    servers, which the first rank there pushes weights to.

    Args:
        python: Python of the environment that has vLLM, as in ``.vllm-env/bin/python``, on every machine.
        options: vLLM's own options, as in ``[--gpu-memory-utilization=0.4, --max-model-len=9000]``.
        devices_per_server: Ranks that share a server, which spreads the model over their devices by tensor parallelism:
            for models that one device has no room for beside training.
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
        devices_per_server: int = 1,
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
        if devices_per_server < 1:
            raise ValueError(f"engine.devices_per_server must be at least 1, got {devices_per_server}")
        self.python, self.options, self.start_seconds = python, list(options or []), start_seconds
        for option in self.options:
            if option.partition("=")[0].replace("_", "-") in PARALLEL:
                raise ValueError(f"engine.options has {option}; set engine.devices_per_server instead")
        self.devices_per_server = devices_per_server
        self.process: ServerProcess | None = None
        self._local, self._number = 0, 0

    def setup(self) -> None:
        """As every engine with servers, once there is vLLM to start them with."""
        if self.process is None:
            check_python(self.python)
        super().setup()

    def check_overlap(self) -> None:
        raise ValueError(
            "model.overlap needs servers with devices of their own, and those of VLLMColocatedEngine share them with "
            "training; start servers with lit-rlvr serve and use VLLMServerEngine"
        )

    def start(self, policy: Policy, reduce: Reduce) -> None:
        """Start the server of this rank and its neighbours, and tell the others on this machine where it is.

        Raises:
            ValueError: When a machine's ranks cannot be shared out among servers.
            RuntimeError: On every rank, when a server did not start.
        """
        host = socket.gethostname()
        ranks = reduce.gather((host, visible_device(policy.device)))
        here = [rank for rank, (name, _) in enumerate(ranks) if name == host]
        self._local, size = here.index(reduce.rank), self.devices_per_server
        self._number = self._local // size
        mates = here[self._number * size :][:size]
        problem: Exception | None = None
        try:
            if len(here) % size:
                raise ValueError(
                    f"engine.devices_per_server is {size}, but {host} has {len(here)} ranks of the run, which is no "
                    "multiple of it"
                )
            if mates[0] == reduce.rank:
                self._start_own(policy, [device for _, device in (ranks[mate] for mate in mates) if device])
        except (ValueError, RuntimeError) as error:
            problem = error
        said = reduce.gather((None if self.process is None else self.process.address, problem and str(problem)))
        if failed := [text for _, text in said if text]:
            self.close()
            raise problem or RuntimeError(failed[0])
        self.connect([address for address, _ in (said[rank] for rank in here) if address])
        on_every_rank(self.meet, reduce)

    def _start_own(self, policy: Policy, devices: list[str]) -> None:
        port, environment = free_port(), server_environment()
        if devices:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
        options = [*self.options, *(["--enable-sleep-mode"] if self.sleep_level else [])]
        if self.devices_per_server > 1:
            options.append(f"{PARALLEL[0]}={self.devices_per_server}")
        command = server_command(self.python, str(policy.hf.config.name_or_path), HOST, port, options)
        output = Path(tempfile.mkdtemp(prefix="lit-rlvr-vllm-")) / "server.log"
        log.info("starting a vLLM server; its output goes to %s", output)
        self.process = ServerProcess(command, environment, f"http://{HOST}:{port}", output)
        atexit.register(self.process.stop)
        self.process.wait_until_ready(self.start_seconds)

    def kept(self) -> list[VLLMClient]:
        """The machine's servers, on its first rank."""
        return self.clients if self._local == 0 else []

    def share(self) -> list[tuple[VLLMClient, Served]]:
        """The server that is on this rank's device."""
        return [(self.clients[self._number], self.served[self._number])]

    def close(self) -> None:
        super().close()
        if self.process is not None:
            self.process.stop()
            atexit.unregister(self.process.stop)
            self.process = None
        self.clients, self._asleep = [], False


def visible_device(device: torch.device) -> str | None:
    """What ``CUDA_VISIBLE_DEVICES`` calls a device of this process; None for one that is no GPU."""
    if device.type != "cuda":
        return None
    visible = [*filter(None, os.environ.get("CUDA_VISIBLE_DEVICES", "").split(","))]
    return visible[device.index] if visible else str(device.index)


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        port: int = listener.getsockname()[1]
        return port
