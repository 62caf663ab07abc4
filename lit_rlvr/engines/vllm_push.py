"""Sends a policy's weights to vLLM servers, through files in a folder that both sides see."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lit_rlvr.engines.vllm_client import VLLMClient
from lit_rlvr.policy import Policy
from lit_rlvr.reduce import Reduce
from lit_rlvr.weights import named_weights


def push_weights(
    policy: Policy,
    servers: Sequence[VLLMClient],
    version: str,
    dtype: torch.dtype,
    folder: Path,
    file_bytes: int,
    reduce: Reduce,
) -> None:
    """Replace the servers' weights by the policy's. Every rank calls it, and rank 0 sends.

    Weights go file by file: one is written, loaded by all servers and deleted before the next, so that neither side
    ever holds more than ``file_bytes`` (or the largest weight) beside its own copy.

    Args:
        policy: The policy.
        servers: Where to.
        version: The new weights' name, which the servers give with every response.
        dtype: What matrices are rounded to before they are sent: the servers' own dtype, so nothing else is lost.
        folder: Where the files go for a moment.
        file_bytes: Size of a file from which it is sent.
        reduce: Reaches the other ranks.

    Raises:
        Exception: On every rank, when a server did not take the weights.
    """

    def send() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="lit-rlvr-weights-", dir=folder) as place:
            Path(place).chmod(0o755)  # a server may be another user's
            sender = _Sender(servers, Path(place), file_bytes)
            everywhere(servers, lambda server: server.call("lit_rlvr_begin"))
            for name, tensor in weights:
                sender.add(name, _rounded(tensor, dtype))
            sender.flush()
            everywhere(servers, lambda server: server.use_weights(version))

    weights = named_weights(policy)
    on_first_rank(send, reduce, meanwhile=weights)


class _Sender:
    """Collects weights until they fill a file."""

    def __init__(self, servers: Sequence[VLLMClient], folder: Path, file_bytes: int) -> None:
        self.servers, self.folder, self.file_bytes = servers, folder, file_bytes
        self.waiting: dict[str, Tensor] = {}
        self.size = self.files = 0

    def add(self, name: str, tensor: Tensor) -> None:
        self.waiting[name] = tensor.cpu().contiguous()
        self.size += tensor.nbytes
        if self.size >= self.file_bytes:
            self.flush()

    def flush(self) -> None:
        """Write what is waiting, have it loaded everywhere, and delete it."""
        if not self.waiting:
            return
        file, number = self.folder / f"weights-{self.files:05d}.safetensors", self.files
        save_file(self.waiting, file)
        self.waiting, self.size, self.files = {}, 0, number + 1
        file.chmod(0o644)
        everywhere(self.servers, lambda server: server.call("lit_rlvr_load", file=str(file), number=number))
        file.unlink()


def _rounded(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Matrices in the server's dtype; vectors as they are, because servers keep some of them in float32."""
    return tensor.to(dtype) if tensor.is_floating_point() and tensor.dim() > 1 else tensor


def everywhere(servers: Sequence[VLLMClient], do: Callable[[VLLMClient], Any]) -> None:
    """Do something on all servers at a time; the first failure is raised once all have ended."""
    with ThreadPoolExecutor(max(1, len(servers))) as pool:
        for done in [pool.submit(do, server) for server in servers]:
            done.result()


def on_first_rank(do: Callable[[], Any], reduce: Reduce, meanwhile: Iterable[Any] = ()) -> None:
    """Do something on rank 0 and wait for it on all; its failure is raised on every rank, so that none waits for ever.

    Args:
        do: What rank 0 does.
        reduce: Reaches the other ranks.
        meanwhile: What the others go through at the same time, and rank 0 what it has left of it.
    """
    failure: Exception | None = None
    if reduce.rank == 0:
        try:
            do()
        except Exception as error:
            failure = error
    for _ in meanwhile:
        pass
    said = reduce.gather(None if failure is None else str(failure))[0]
    if failure is not None:
        raise failure
    if said is not None:
        raise RuntimeError(said)
