"""Faster linear layers on x86 CPUs: weights in the layout of oneDNN's kernels, for as long as they do not change.

With few rows, as in decoding, an ordinary float32 product spends much of its time on bringing the weights into the
order that its inner loop wants. Here that is done once per rollout instead of once per token.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

OPS: Any = torch.ops
ROWS = (1, 48)
"""Numbers of rows in the self-test; kernels differ by them."""
COLUMNS = 256
"""Outputs that the self-test computes in float64."""

_passed: dict[tuple[int, int], bool] = {}
"""Whether each shape [out, in] that came up in this process passed the self-test."""


@contextmanager
def packed_linears(module: nn.Module) -> Iterator[int]:
    """Inside, the module's linear layers compute with packed copies of their weights, and without gradients.

    Layers are left as they are where it does not apply: away from x86 CPUs, in other types than float32, under
    autocast, in subclasses of ``nn.Linear``, and in shapes that do not pass a comparison with float64. Weights must not
    change meanwhile; the copies take as much memory as the weights.

    Yields:
        Number of layers that are packed.
    """
    layers = module.modules() if _available() else iter(())
    done: list[nn.Module] = []
    try:
        for layer in layers:
            if not isinstance(layer, nn.Linear) or not _applies(layer):
                continue
            weights = _pack(layer.weight)
            if _is_right(layer.weight, weights):
                layer.__dict__["forward"] = partial(_linear, weights, layer.bias)
                done.append(layer)
            del weights
        yield len(done)
    finally:
        for layer in done:
            del layer.__dict__["forward"]


def _available() -> bool:
    mkldnn = torch.backends.mkldnn
    x86 = platform.machine() in ("x86_64", "AMD64")
    return x86 and mkldnn.is_available() and not torch.is_autocast_enabled("cpu")


def _applies(layer: nn.Linear) -> bool:
    if type(layer) is not nn.Linear or "forward" in layer.__dict__:
        return False
    weight = layer.weight
    return type(weight) is nn.Parameter and weight.device.type == "cpu" and weight.dtype == torch.float32


def _pack(weight: Tensor) -> Tensor:
    packed: Tensor = OPS.mkldnn._reorder_linear_weight(weight.detach(), None)
    return packed


def _linear(weights: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    out: Tensor = OPS.mkldnn._linear_pointwise(x, weights, bias, "none", [], "")
    return out


def _is_right(weight: Tensor, packed: Tensor) -> bool:
    """Whether products with ``packed`` are as close to float64 as ordinary ones; tried once per shape."""
    shape = (weight.shape[0], weight.shape[1])
    if shape not in _passed:
        _passed[shape] = _self_test(weight.detach(), packed)
        if not _passed[shape]:
            log.warning("oneDNN's product of shape %s is not accurate here; the ordinary one is used", shape)
    return _passed[shape]


def _self_test(weight: Tensor, packed: Tensor) -> bool:
    """Compare with float64 on some outputs, and with the ordinary product on all of them.

    A float32 sum of many products errs by about eps/2 times the sum of their absolute values, whatever their number
    (roundings of partial sums that grow like a random walk); eight times that is allowed. Factors rounded to bfloat16
    or TF32 err by more than that allows in sums of up to 2^22 products.
    """
    columns = slice(None, None, -(-len(weight) // COLUMNS))
    allowed = 4 * torch.finfo(torch.float32).eps
    generator = torch.Generator().manual_seed(0)
    for rows in ROWS:
        x = torch.randn(rows, weight.shape[1], generator=generator)
        bound = allowed * nn.functional.linear(x.abs(), weight.abs())
        ordinary, ours = nn.functional.linear(x, weight), _linear(packed, None, x)
        exact = x.double() @ weight[columns].double().T
        close = (ours[:, columns] - exact).abs() <= bound[:, columns]
        if not bool(close.all() and ((ours - ordinary).abs() <= 2 * bound).all()):
            return False
    return True
