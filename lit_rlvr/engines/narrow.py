"""Under autocast: weights of linear layers that are cast once per rollout instead of once per step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn


@contextmanager
def narrowed_linears(module: nn.Module, device: torch.device) -> Iterator[int]:
    """Inside, under autocast, the module's float32 linear layers compute with copies in autocast's dtype.

    Results are the same: autocast would cast the same weights. It keeps copies of its own only of weights that are
    trained, and none while a graph is captured. Without autocast nothing is done. Weights must not change meanwhile.

    Yields:
        Number of layers with a copy.
    """
    on = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if on else None
    done: list[nn.Module] = []
    try:
        for layer in module.modules() if on else ():
            if type(layer) is nn.Linear and "forward" not in layer.__dict__ and _is_whole(layer.weight):
                layer.__dict__["forward"] = partial(_linear, layer.weight.detach().to(dtype), layer.bias)
                done.append(layer)
        yield len(done)
    finally:
        for layer in done:
            del layer.__dict__["forward"]


def _is_whole(weight: Tensor) -> bool:
    return type(weight) is nn.Parameter and weight.dtype == torch.float32


def _linear(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    return nn.functional.linear(x, weight, bias)
