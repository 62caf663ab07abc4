"""Sampling from vLLM servers that are already running."""

from __future__ import annotations

from typing import Literal
from urllib.parse import urlsplit

from lit_rlvr.engines.vllm_client import is_here
from lit_rlvr.engines.vllm_engine import VLLMEngine
from lit_rlvr.policy import Policy
from lit_rlvr.reduce import Reduce


class VLLMServerEngine(VLLMEngine):
    """Samples from vLLM servers that ``lit-rlvr serve`` started, here or on other machines.

    Before a phase is sampled, rank 0 pushes the policy's weights to all servers. Prompts are spread evenly; with
    several ranks, each talks to its own share of the servers. Old log-probabilities come from the training model; the
    servers' are compared with them.

    Args:
        addresses: ``http://host:port`` of each server.
        folder: Where weights wait to be loaded, a file at a time: a folder that rank 0 and every server see under this
            path. Null: memory shared on this machine, when all servers run here.
        file_megabytes: Size of a file of weights, or of what is broadcast at a time: what a push takes beside the
            copies of the policy.
        timeout: Seconds that a request may take, whether it samples or loads.
        retries: How often a request is repeated when a server does not answer, or fails.
        requests: Most prompts that are sampled at a time on one server.
        sleep_level: 0: servers keep their memory while the policy learns. 1: they give up the cache, and move weights
            to the host's memory. 2: they give up both. Above 0, start them with ``--enable-sleep-mode``.
        transport: How weights reach the servers. ``files``: through ``folder``. ``gloo``: from memory to memory over
            TCP. ``nccl``: between GPUs. ``auto``: through memory shared on this machine when all servers run here, else
            by gloo. A broadcast that does not come about is replaced by files, if there is a folder.

    Raises:
        ValueError: For an option out of range, or ``files`` for servers elsewhere without ``folder``.
        ImportError: Without the package requests.
    """

    def __init__(
        self,
        addresses: list[str],
        folder: str | None = None,
        file_megabytes: int = 512,
        timeout: float = 1800.0,
        retries: int = 3,
        requests: int = 128,
        sleep_level: int = 0,
        transport: Literal["auto", "files", "gloo", "nccl"] = "auto",
    ) -> None:
        super().__init__(folder, file_megabytes, timeout, retries, requests, sleep_level)
        check_addresses(addresses)
        if transport not in ("auto", "files", "gloo", "nccl"):
            raise ValueError(f"engine.transport must be auto, files, gloo or nccl, got {transport!r}")
        elsewhere = [a for a in addresses if not is_here(str(urlsplit(a).hostname))]
        if folder is None and elsewhere:
            self.folder = None
            if transport == "files":
                raise ValueError(
                    f"the vLLM server {elsewhere[0]} is on another machine: set engine.folder to a folder that this "
                    "machine and every server see under the same path, or engine.transport to auto"
                )
        if transport in ("gloo", "nccl"):
            self.backend = transport
        elif transport == "auto" and elsewhere:
            self.backend = "gloo"
        self.connect(addresses)

    def setup(self) -> None:
        super().setup()
        self.meet()

    def check_overlap(self) -> None:
        if self.sleep_level:
            raise ValueError(
                f"model.overlap has servers sample while the policy learns, but engine.sleep_level {self.sleep_level} "
                "has them sleep then; set it to 0"
            )

    def start(self, policy: Policy, reduce: Reduce) -> None:
        self.meet()


def check_addresses(addresses: list[str]) -> None:
    """Refuse addresses that cannot be right.

    Raises:
        ValueError: Naming the first.
    """
    if not addresses:
        raise ValueError("engine.addresses needs the address of a vLLM server, such as http://127.0.0.1:8000")
    for address in addresses:
        if urlsplit(address).scheme not in ("http", "https") or not urlsplit(address).hostname:
            raise ValueError(f"engine.addresses has {address!r}; an address looks like http://127.0.0.1:8000")
    if len({address.rstrip("/") for address in addresses}) < len(addresses):
        raise ValueError("engine.addresses has the same server twice")
