"""Sends a policy's weights to vLLM servers, part by part; one road is files in a folder that both sides see."""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, as_completed
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lit_rlvr.engines.background import Background
from lit_rlvr.engines.vllm_client import VLLMClient
from lit_rlvr.policy import Policy
from lit_rlvr.reduce import Reduce, on_every_rank
from lit_rlvr.weights import named_weights


def push_weights(
    policy: Policy,
    servers: Sequence[VLLMClient],
    version: str,
    dtype: torch.dtype,
    road: Callable[[], Road],
    part_bytes: int,
    reduce: Reduce,
) -> None:
    """Replace the servers' weights by the policy's. Every rank calls it, and those with servers to look after send.

    Weights go part by part: one is loaded by all servers before the next is sent, so that neither side ever holds more
    than ``part_bytes`` (or the largest weight) beside its own copy.

    Args:
        policy: The policy.
        servers: Those that this rank looks after; none: others send.
        version: The new weights' name, which the servers give with every response.
        dtype: What matrices are rounded to before they are sent: the servers' own dtype, so nothing else is lost.
        road: Opens the road that parts take.
        part_bytes: Size of a part from which it is sent.
        reduce: Reaches the other ranks.

    Raises:
        Exception: On every rank, when a server did not take the weights.
    """

    def send() -> None:
        way = road()
        everywhere(servers, lambda server: server.call("lit_rlvr_begin"))
        for number, part in enumerate(parts(((name, _rounded(tensor, dtype)) for name, tensor in weights), part_bytes)):
            way.send(number, part)
        everywhere(servers, lambda server: server.use_weights(version))

    weights = named_weights(policy)
    on_every_rank(send if servers else lambda: None, reduce, meanwhile=weights)


class Road(ABC):
    """A way for weights to reach servers."""

    @abstractmethod
    def send(self, number: int, part: dict[str, Tensor]) -> None:
        """Have all servers load a part of an update.

        Args:
            number: Parts of the update before it.
            part: Weights by name.
        """

    def close(self) -> None:  # noqa: B027
        """No more will be sent."""


class FileRoad(Road):
    """Files, which are deleted as soon as they are loaded.

    Args:
        servers: Where to.
        folder: Where the files go for a moment.
    """

    def __init__(self, servers: Sequence[VLLMClient], folder: Path) -> None:
        self.servers, self.folder = servers, folder.absolute()  # a server may have been started elsewhere

    def send(self, number: int, part: dict[str, Tensor]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="lit-rlvr-weights-", dir=self.folder) as place:
            Path(place).chmod(0o755)  # a server may be another user's
            file = Path(place) / f"{number:05d}.safetensors"
            save_file({name: tensor.cpu().contiguous() for name, tensor in part.items()}, file)
            file.chmod(0o644)
            everywhere(self.servers, lambda server: server.call("lit_rlvr_load", file=str(file), number=number))


def parts(weights: Iterable[tuple[str, Tensor]], size: int) -> Iterator[dict[str, Tensor]]:
    """Weights in parts of ``size`` bytes, or as much more as the last of a part takes."""
    part, held = dict[str, Tensor](), 0
    for name, tensor in weights:
        part[name] = tensor
        held += tensor.nbytes
        if held >= size:
            yield part
            part, held = {}, 0
    if part:
        yield part


def _rounded(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Matrices in the server's dtype; vectors as they are, because servers keep some of them in float32."""
    return tensor.to(dtype) if tensor.is_floating_point() and tensor.dim() > 1 else tensor


def everywhere(servers: Sequence[VLLMClient], do: Callable[[VLLMClient], Any]) -> None:
    """Do something on all servers at a time; the first failure is raised at once, whatever the others are at."""
    with Background(len(servers)) as threads:
        raise_first(as_completed([threads.submit(do, server) for server in servers]))


def raise_first(done: Iterable[Future[Any]]) -> None:
    """Raise what one of them ended with, if it is a failure."""
    for call in done:
        call.result()
