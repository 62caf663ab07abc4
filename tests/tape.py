"""CUDA graphs as they are, on a CPU: what was recorded runs again on the same memory, and no Python of ours with it.

Every operation below autograd and autocast is recorded with its actual arguments. A replay runs the same operations on
the same tensors and writes their results into the very tensors that they had, so numbers that were Python's stay what
they were, and a tensor that has been replaced since is not seen. What waits for the device, or whose result has a shape
that depends on values, is refused. Memory in between belongs to nobody once a replay is over: it is filled with NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ATEN: Any = torch.ops.aten
REFUSED = (
    ATEN._local_scalar_dense,
    ATEN.nonzero,
    ATEN.masked_select,
    ATEN._unique2,
    ATEN.unique_dim,
    ATEN.unique_consecutive,
    ATEN.bincount,
    ATEN.repeat_interleave,
    ATEN.equal,
    ATEN.is_nonzero,
    ATEN.lift_fresh,
    ATEN.bernoulli,
    ATEN.multinomial,
)
"""Reading a number, shapes that depend on values, tensors made from Python's numbers, random numbers."""


class CaptureError(RuntimeError):
    """What CUDA would not capture."""


class Tape(TorchDispatchMode):
    """One recorded function."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []
        self.made: list[Tensor] = []
        """Tensors that the function made, in memory of their own."""
        self._own: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and keep it."""
        kwargs = kwargs or {}
        boolean = func.overloadpacket in (ATEN.index, ATEN.index_put, ATEN.index_put_, ATEN._index_put_impl_) and any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if func.overloadpacket in REFUSED or boolean:
            raise CaptureError(f"{func} cannot be captured")
        out = func(*args, **kwargs)
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        results = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        for result in results:
            place = result.untyped_storage()._cdata
            if place not in given and place not in self._own:
                self._own.add(place)
                self.made.append(result)
        self.steps.append((func, args, kwargs, results))
        return out

    def replay(self) -> None:
        """Run everything again, in place."""
        for func, args, kwargs, results in self.steps:
            again = [t for t in tree_leaves(func(*args, **kwargs)) if isinstance(t, Tensor)]
            for result, new in zip(results, again, strict=True):
                if result.data_ptr() != new.data_ptr():
                    result.copy_(new)


class TapeRecorder:
    """A recorder whose tapes share memory, as graphs of one pool do."""

    def __init__(self, purpose: str = "") -> None:
        self.purpose = purpose
        self.tapes: list[Tape] = []
        self.replays = 0

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """See :class:`lit_rlvr.engines.capture.Recorder`."""
        run()
        tape = Tape()
        with tape:
            run()
        self.tapes.append(tape)
        self._poison()

        def replay() -> None:
            self.replays += 1
            tape.replay()
            self._poison()

        return replay

    def _poison(self) -> None:
        for tape in self.tapes:
            for tensor in tape.made:
                if tensor.is_floating_point():
                    tensor.fill_(torch.nan)
                elif tensor.dtype == torch.int64:
                    tensor.fill_(-(2**62))


class Looks(TorchFunctionMode):
    """Lists what Python reads from tensors or makes them from: there a GPU is waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._inside = _Inside(self.found)

    def __enter__(self) -> Looks:
        """Begin."""
        super().__enter__()
        self._inside.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """End."""
        self._inside.__exit__(*error)
        super().__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a call of Python's."""
        if (name := getattr(func, "__name__", "")) in ("tolist", "cpu", "numpy", "tensor"):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


class _Inside(TorchDispatchMode):
    """Lists operations that read."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation."""
        if func.overloadpacket in REFUSED and func.overloadpacket is not ATEN.lift_fresh:
            self.found.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))
