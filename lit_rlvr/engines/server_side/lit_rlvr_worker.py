"""Runs inside vLLM's worker processes and takes in the weights that training pushes.

This one file needs vLLM and nothing else, because a server has an environment of its own, on machines where lit-rlvr
need not be installed. ``lit-rlvr serve`` puts its folder on ``PYTHONPATH``; elsewhere, copy the file to the server and
start vLLM with ``--worker-extension-cls lit_rlvr_worker.WeightReceiver``.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from math import prod
from typing import Any

import torch
from torch import Tensor

dist: Any = torch.distributed
"""Its annotations leave some of its classes out."""

PROTOCOL = 3
"""Raised whenever the methods below change; the trainer refuses a server with another number."""

BROADCAST_SECONDS = 300.0
"""How long a part of an update may take on its way."""

ALIGNMENT = 16
"""A weight in a buffer begins at a multiple of so many bytes."""


class WeightReceiver:
    """Methods that vLLM adds to its workers; the trainer calls them over ``/collective_rpc``.

    One update is ``lit_rlvr_begin``, then ``lit_rlvr_load`` for every file or, after ``lit_rlvr_join``,
    ``lit_rlvr_receive`` for every part, then ``lit_rlvr_finish``. Weights are loaded into the memory of those that they
    replace, layer by layer, so that no second copy of the model is made.
    """

    _lit_rlvr_missing: set[str] | None = None
    _lit_rlvr_parts: int = 0
    _lit_rlvr_error: str | None = None
    _lit_rlvr_group: Any = None

    def lit_rlvr_about(self) -> dict[str, Any]:
        """What the server serves, and the protocol of this file."""
        worker: Any = self
        config = worker.vllm_config.model_config
        sizes = {"vocabulary": config.get_vocab_size(), "hidden": config.get_hidden_size()}
        return {**sizes, "protocol": PROTOCOL, "nccl": nccl_version()}

    def lit_rlvr_join(self, host: str, port: int, first: int, **options: Any) -> dict[str, Any]:
        """Join the trainer and all workers in a group, in which weights are broadcast.

        Args:
            host: Where the trainer is.
            port: Where the group meets there.
            first: The rank of this server's first worker in the group; the trainer's is 0.
            options: ``size``, ``backend`` and ``seconds`` of :class:`Group`.
        """
        worker: Any = self
        if self._lit_rlvr_group is not None:
            self._lit_rlvr_group.leave()
        self._lit_rlvr_group = None
        store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=options["seconds"]))
        self._lit_rlvr_group = Group(
            store, first + worker.rank, address=own_address(host), device=worker.device, **options
        )
        return {}

    def lit_rlvr_begin(self) -> dict[str, Any]:
        """Make the model ready to take weights in; an update that was cut short is begun again."""
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        worker: Any = self
        if self._lit_rlvr_missing is not None:
            self._lit_rlvr_end()
        with set_current_vllm_config(worker.vllm_config):
            model = worker.get_model()
            self._lit_rlvr_missing = {name for name, _ in model.named_parameters()}
            initialize_layerwise_reload(model)
        return {}

    def lit_rlvr_load(self, file: str, number: int) -> dict[str, Any]:
        """Load a safetensors file, whose weights have the names of a Hugging Face checkpoint.

        Args:
            file: Path of the file.
            number: Files of this update before it. One that has been loaded is not loaded again: vLLM counts the
                numbers that it has loaded of a layer, and would take a repeated request's for those that are still to
                come.
        """
        if not self._lit_rlvr_comes_again(number):
            with self._lit_rlvr_loading(number):
                self.lit_rlvr_use(read_file(file))
        return {}

    def lit_rlvr_receive(self, number: int, weights: list[list[Any]]) -> dict[str, Any]:
        """Load a part of the weights that the trainer broadcasts now.

        Args:
            number: Parts of this update before it, as for files.
            weights: Name, dtype and shape of each, in order.
        """
        if not self._lit_rlvr_comes_again(number):
            with self._lit_rlvr_loading(number):
                if self._lit_rlvr_group is None:
                    raise RuntimeError("the server was restarted, and is not in the trainer's group any more")
                buffer = self._lit_rlvr_group.empty(places(weights)[-1])
                self._lit_rlvr_group.broadcast(buffer).wait()
                self.lit_rlvr_use(unpack(buffer, weights))
        return {}

    def lit_rlvr_finish(self) -> dict[str, Any]:
        """Put the new weights into use, and name the model's weights that no file had."""
        if self._lit_rlvr_missing is None:
            return {"missing": []}
        return {"missing": self._lit_rlvr_end()}

    def lit_rlvr_use(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Load weights, under the names of a Hugging Face checkpoint, that are in this process already.

        Each is copied into the memory of what it replaces, together with the others of its linear layer.
        """
        from vllm.config import set_current_vllm_config

        worker: Any = self
        with set_current_vllm_config(worker.vllm_config):
            loaded = worker.get_model().load_weights(weights)
        assert self._lit_rlvr_missing is not None
        # Models that do not say what they loaded cannot be checked.
        self._lit_rlvr_missing -= self._lit_rlvr_missing.copy() if loaded is None else set(loaded)

    def _lit_rlvr_comes_again(self, number: int) -> bool:
        """Whether a part has been loaded already.

        Raises:
            RuntimeError: When it is not this one's turn.
        """
        if number < self._lit_rlvr_parts:
            return True
        if self._lit_rlvr_missing is None or number > self._lit_rlvr_parts:
            raise RuntimeError(f"part {number} of the new weights comes out of turn; the update must be begun again")
        return False

    @contextmanager
    def _lit_rlvr_loading(self, number: int) -> Iterator[None]:
        """Count a part, or keep why it could not be loaded: nothing is loaded after a failure."""
        if self._lit_rlvr_error is None:
            try:
                yield
            except Exception as error:
                self._lit_rlvr_error = f"{type(error).__name__} {error}".strip()
        if self._lit_rlvr_error is not None:
            raise RuntimeError(f"new weights could not be loaded: {self._lit_rlvr_error}")
        self._lit_rlvr_parts = number + 1

    def _lit_rlvr_end(self) -> list[str]:
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        worker: Any = self
        missing = sorted(self._lit_rlvr_missing or ())
        self._lit_rlvr_missing, self._lit_rlvr_parts, self._lit_rlvr_error = None, 0, None
        with set_current_vllm_config(worker.vllm_config):
            model = worker.get_model()
            finalize_layerwise_reload(model, worker.vllm_config.model_config)
            _pack_again(model)
            worker.model_runner.reset_lora_state()
        return missing


class Group:
    """The trainer's first process, of rank 0, and all workers of all servers; it broadcasts bytes to them.

    Both sides make one, and return when all members have.

    Args:
        store: Where members meet, on the trainer's side.
        rank: Of this member.
        size: Members.
        backend: ``gloo`` sends from the memory of hosts over TCP; ``nccl`` sends between GPUs.
        address: This host's, as the others reach it.
        seconds: How long meeting may take; a broadcast has ``BROADCAST_SECONDS``.
        device: What ``nccl`` sends from.
    """

    def __init__(
        self, store: Any, rank: int, size: int, backend: str, address: str, seconds: float, device: torch.device
    ) -> None:
        store, limit = dist.PrefixStore("lit-rlvr", store), timedelta(seconds=seconds)
        options: Any
        if backend == "nccl":
            if not dist.is_nccl_available():
                raise RuntimeError("there is no NCCL for a broadcast here")
            self.device, options = device, dist.ProcessGroupNCCL.Options()
            options._timeout = limit
            self._group: Any = dist.ProcessGroupNCCL(store, rank, size, options)
        else:
            self.device, options = torch.device("cpu"), dist.ProcessGroupGloo._Options()
            options._timeout, options._devices = limit, [dist.ProcessGroupGloo.create_device(hostname=address)]
            self._group = dist.ProcessGroupGloo(store, rank, size, options)
        self.broadcast(self.empty(ALIGNMENT)).wait()
        self._group._set_default_timeout(timedelta(seconds=BROADCAST_SECONDS))

    def empty(self, size: int) -> Tensor:
        """A buffer of ``size`` bytes, where the group needs it."""
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def broadcast(self, buffer: Tensor) -> Any:
        """Begin to fill all members' buffers with that of rank 0; the result's ``wait()`` ends it."""
        return self._group.broadcast(buffer, 0)

    def leave(self) -> None:
        """Give up what is under way, which others may never take part in, and close all connections."""
        if self.device.type == "cuda":  # gloo's are closed as soon as nobody holds the group
            self._group.abort()
        self._group = None


def nccl_version() -> list[int] | None:
    """NCCL's version, or None without GPUs; all members of a group need the same."""
    if not torch.cuda.is_available() or not dist.is_nccl_available():
        return None
    from torch.cuda import nccl

    return [int(number) for number in nccl.version()[:3]]


def own_address(other: str) -> str:
    """This host's address, as the host ``other`` reaches it."""
    family, kind, protocol, _, place = socket.getaddrinfo(other, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(place)  # sends nothing
        address: str = probe.getsockname()[0]
        return address


def places(weights: Sequence[Sequence[Any]]) -> list[int]:
    """Where in a buffer each of ``weights`` (name, dtype, shape) begins, and the buffer's size.

    >>> places([("a", "bfloat16", [3, 3]), ("b", "float32", [2])])
    [0, 32, 48]
    """
    ends = [0]
    for _, dtype, shape in weights:
        size = prod(shape) * getattr(torch, dtype).itemsize
        ends.append(ends[-1] + -(-size // ALIGNMENT) * ALIGNMENT)
    return ends


def unpack(buffer: Tensor, weights: Sequence[Sequence[Any]]) -> Iterator[tuple[str, Tensor]]:
    """The weights in a buffer, by name; they are views of it."""
    for (name, dtype, shape), start in zip(weights, places(weights), strict=False):
        kind = getattr(torch, dtype)
        yield name, buffer[start : start + prod(shape) * kind.itemsize].view(kind).view(shape)


def read_file(file: str) -> Iterator[tuple[str, Tensor]]:
    """The weights in a safetensors file, by name."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as weights:
        for name in list(weights.keys()):
            yield name, weights.get_tensor(name)


def _pack_again(model: Any) -> None:
    """Renew what a layer keeps beside its weight.

    On a CPU vLLM computes with a packed copy. A head that is tied to the embeddings shares their weight but has a
    packed copy of its own, which loading the embeddings leaves as it was: the head would go on with the old weights.
    """
    for layer in model.modules():
        if hasattr(layer, "cpu_linear") and layer.weight.numel():
            layer.quant_method.process_weights_after_loading(layer)
