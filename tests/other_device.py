"""A device that stands in for a GPU: it computes as the CPU does, but its tensors are its own.

An operation that mixes them with the CPU's fails as it would on a GPU, and copies to the host are counted. It takes
PyTorch's one slot for devices from outside, so it belongs into a process of its own; see ``other_device_run.py``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "other"
aten = torch.ops.aten

TAKE_INDICES = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
"""Operations whose indices may lie on the CPU, as on a GPU, where it costs a copy."""

WAIT = {
    getattr(aten, name).default
    for name in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2", "unique_dim")
}
"""Operations whose result, or its shape, the host needs."""

reads: Counter[str] = Counter()
"""How often the host has waited for the device, by what it did."""


class Backend(_DummyBackendModule):
    """What PyTorch asks a device's module for."""

    def get_rng_state(self, device: Any = 0) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = 0) -> None:
        """The CPU's generator is put back by itself."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def device(self, device: Any) -> Any:
        return nullcontext()


class Elsewhere(Tensor):
    """A tensor of the device; ``raw`` holds its numbers."""

    raw: Tensor

    @staticmethod
    def __new__(cls, raw: Tensor) -> Any:
        shape = {"strides": raw.stride(), "storage_offset": raw.storage_offset(), "dtype": raw.dtype}
        tensor = Tensor._make_wrapper_subclass(cls, raw.size(), device=device(), **shape)  # type: ignore[attr-defined]
        tensor.raw = raw
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})

    def __repr__(self, **kwargs: Any) -> str:
        return f"Elsewhere({self.raw})"

    def tolist(self) -> Any:
        reads["tolist"] += 1
        return self.raw.tolist()


class AlsoWithoutTensors(TorchDispatchMode):
    """Sees what makes tensors of the device from none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


def compute(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operation of the device on the CPU; any other as it is."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    goal = None if kwargs.get("device") is None else torch.device(kwargs["device"]).type
    if goal != NAME and not any(isinstance(tensor, Elsewhere) for tensor in tensors):
        return func(*args, **kwargs)
    if goal is None and func is not aten.copy_.default:
        refuse_mixture(func, args, tensors)
    note_reads(func, args, goal)
    own = {**kwargs, "device": torch.device("cpu")} if goal == NAME else kwargs
    raw_args, raw_kwargs = tree_map(raw, (args, own))
    out = func(*raw_args, **raw_kwargs)
    if func is aten.copy_.default:
        return args[0]
    if goal not in (None, NAME):
        return out
    wrapped = tree_map(lambda value: Elsewhere(value) if isinstance(value, Tensor) else value, out)
    return return_and_correct_aliasing(func, args, kwargs, wrapped)


def refuse_mixture(func: Any, args: Any, tensors: list[Tensor]) -> None:
    """Raise where a GPU would: single numbers of the CPU are taken, and so are its indices."""
    if func in TAKE_INDICES and isinstance(args[0], Elsewhere):
        tensors = [leaf for leaf in tree_leaves((args[0], args[2:])) if isinstance(leaf, Tensor)]
    if any(not isinstance(tensor, Elsewhere) and tensor.dim() for tensor in tensors):
        raise RuntimeError(f"{func}: expected all tensors to be on the same device")


def note_reads(func: Any, args: Any, goal: str | None) -> None:
    """Count what makes the host wait for a GPU."""
    by_mask = func in TAKE_INDICES and any(t is not None and t.dtype == torch.bool for t in args[1])
    to_host = not isinstance(args[0], Elsewhere) if func is aten.copy_.default else goal == "cpu"
    if func in WAIT or by_mask or (to_host and func in (aten.copy_.default, aten._to_copy.default)):
        reads[str(func).removeprefix("aten.")] += 1


def raw(value: Any) -> Any:
    """The numbers of a tensor of the device; anything else as it is."""
    return value.raw if isinstance(value, Elsewhere) else value


def empty(size: Any, **options: Any) -> Tensor:
    """``torch.empty`` where no mode is asked, as in threads."""
    return Elsewhere(torch.empty(size, dtype=options.get("dtype")))


def empty_strided(size: Any, stride: Any, **options: Any) -> Tensor:
    """``torch.empty_strided`` where no mode is asked."""
    return Elsewhere(torch.empty_strided(size, stride, dtype=options.get("dtype")))


def copy_from(source: Tensor, goal: Tensor, non_blocking: bool = False) -> Tensor:
    """``goal.copy_(source)`` where no mode is asked."""
    raw(goal).copy_(raw(source))
    return goal


@cache
def register() -> torch.library.Library:
    """Give PyTorch the device, for good; nothing is registered any more once the result is forgotten."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=Backend())
    library = torch.library.Library("aten", "IMPL")
    for name, kernel in {"empty.memory_format": empty, "empty_strided": empty_strided, "_copy_from": copy_from}.items():
        library.impl(name, kernel, "PrivateUse1")
    return library


def device() -> torch.device:
    """The device, which only a process that has called :func:`register` knows."""
    return torch.device(NAME, 0)


class OtherAccelerator(Accelerator):
    """Lightning's view of the device."""

    def setup_device(self, device: torch.device) -> None:
        """It is always ready."""

    def teardown(self) -> None:
        """It holds nothing."""

    @staticmethod
    def parse_devices(devices: Any) -> list[torch.device]:
        return [device()]

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [device()]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return NAME

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        return {}


def strategy() -> SingleDeviceStrategy:
    """A Lightning strategy that trains on the device."""
    return SingleDeviceStrategy(device=device(), accelerator=OtherAccelerator())


@contextmanager
def available() -> Iterator[Counter[str]]:
    """Inside of it tensors can be made on the device; gives the reads since then."""
    register()
    reads.clear()
    # A parameter that is moved has to take its numbers with it, and not their description alone.
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        with AlsoWithoutTensors():
            yield reads
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swaps)
