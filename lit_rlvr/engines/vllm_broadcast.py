"""Sends weights to vLLM servers over the network, from memory to memory."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, as_completed, wait
from datetime import timedelta
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import torch
from torch import Tensor

from lit_rlvr.engines.background import Background
from lit_rlvr.engines.server_side.lit_rlvr_worker import Group, dist, nccl_version, own_address, places, unpack
from lit_rlvr.engines.vllm_client import Served, VLLMClient, is_here
from lit_rlvr.engines.vllm_push import FileRoad, Road, raise_first

log = logging.getLogger(__name__)

Backend = Literal["gloo", "nccl"]

JOIN_SECONDS = 60.0
"""How long all members of a group may take to meet."""


def open_road(
    backend: Backend | None, servers: Sequence[VLLMClient], served: Sequence[Served], folder: Path | None, device: Any
) -> Road:
    """The way for weights: a broadcast if there is a ``backend`` and all servers can join, else files in ``folder``.

    Raises:
        RuntimeError: When servers cannot join, and there is no folder.
    """
    if backend is not None:
        try:
            return BroadcastRoad(servers, served, backend, device)
        except (RuntimeError, OSError) as problem:
            if folder is None:
                raise RuntimeError(
                    f"weights cannot be broadcast to the vLLM servers: {problem}; set engine.folder to a folder that "
                    "this machine and every server see under the same path"
                ) from problem
            log.warning("weights go through files in %s, because a broadcast does not work: %s", folder, problem)
    assert folder is not None
    return FileRoad(servers, folder)


class BroadcastRoad(Road):
    """This process and all workers of all servers in a group of their own, in which weights are broadcast.

    Args:
        servers: Where to.
        served: What they serve.
        backend: ``gloo`` (over TCP) or ``nccl``.
        device: The policy's device.

    Raises:
        RuntimeError: When a server cannot join.
    """

    def __init__(
        self, servers: Sequence[VLLMClient], served: Sequence[Served], backend: Backend, device: torch.device
    ) -> None:
        self.servers = servers
        for server, about in zip(servers, served, strict=True):
            if about.replicas > 1:
                raise RuntimeError(f"{server.address} has {about.replicas} replicas of the model")
            if backend == "nccl" and about.nccl != (ours := nccl_version()):
                raise RuntimeError(
                    f"{server.address} has {_named(about.nccl)} and training has {_named(ours)}; NCCL connects "
                    "processes with the same version only"
                )
        hosts = [str(urlsplit(server.address).hostname) for server in servers]
        address = own_address(next((host for host in hosts if not is_here(host)), hosts[0]))
        limit = timedelta(seconds=JOIN_SECONDS)
        store = dist.TCPStore(address, 0, is_master=True, timeout=limit, wait_for_workers=False)
        ranks = list(accumulate((about.workers for about in served), initial=1))
        common: dict[str, Any] = {"size": ranks[-1], "backend": backend, "seconds": JOIN_SECONDS}
        with Background(1 + len(servers)) as threads:
            own = threads.submit(Group, store, 0, address=address, device=device, **common)
            joining = [
                threads.submit(server.join, host=address, port=store.port, first=first, **common)
                for server, first in zip(servers, ranks, strict=False)
            ]
            raise_first(as_completed([own, *joining]))  # the first failure is the cause of the others
        self.group: Group | None = own.result()

    def send(self, number: int, part: dict[str, Tensor]) -> None:
        assert self.group is not None
        weights = [[name, str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in part.items()]
        buffer = self.group.empty(places(weights)[-1])
        for name, place in unpack(buffer, weights):
            place.copy_(part[name])
        with Background(len(self.servers)) as threads:
            calls = [threads.submit(s.call, "lit_rlvr_receive", number=number, weights=weights) for s in self.servers]
            sending = self.group.broadcast(buffer)
            try:
                while not sending.is_completed():  # a server that does not take part would be waited for in vain
                    raise_first(wait(calls, timeout=0.005, return_when=FIRST_EXCEPTION).done)
                raise_first(wait(calls, return_when=FIRST_EXCEPTION).done)
                sending.wait()
            except BaseException:
                sending = None  # holds connections, as the group does
                self.close()
                raise

    def close(self) -> None:
        if self.group is not None:
            self.group.leave()
        self.group = None


def _named(version: list[int] | None) -> str:
    """NCCL of a version, or its absence."""
    return "no NCCL" if version is None else f"NCCL {'.'.join(map(str, version))}"
