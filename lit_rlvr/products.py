"""Products of narrow matrices in float32, as which NVIDIA's GPUs add them up anyway.

A product in the operands' own dtype is rounded once more at its end: in bfloat16 a logit of 20 is off by up to 1/16.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)

NARROW = (torch.bfloat16, torch.float16)


def widens(like: Tensor) -> bool:
    """Whether products of matrices like this one can be had in float32."""
    return like.dtype in NARROW and like.device.type == "cuda" and _passes(like.device, like.dtype)


def wide_product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """``a @ b`` [n, m] in float32 of narrow matrices, where :func:`widens` allows it."""
    if out is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b, out_dtype=torch.float32, out=out)


def add_wide_product(total: Tensor, a: Tensor, b: Tensor, keep: bool) -> None:
    """Add ``a @ b`` to the float32 ``total`` [n, m] where it stands, or put it there, if what is there is not kept."""
    torch.addmm(total, a, b, beta=int(keep), out_dtype=torch.float32, out=total)


def head_logits(head: Any, hidden: Tensor) -> Tensor:
    """Logits [n, V] of a linear head without a gradient: in float32 where the device gives them, else as the head does.

    Under autocast the head narrows its weight once and keeps it; here that would be done for every token.
    """
    weight: Tensor = head.weight
    bias: Tensor | None = head.bias
    if torch.is_autocast_enabled(hidden.device.type) or not widens(weight):
        narrow: Tensor = head(hidden)
        return narrow
    logits = wide_product(hidden, weight.T)
    return logits if bias is None else logits + bias


@cache
def _passes(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this version of torch does it on this device; tried once.

    Products of small whole numbers are exact in float32, and too large for the operands' dtype.
    """
    a, b = (torch.arange(start, start + 64, device=device).reshape(8, 8) for start in (1, 100))
    exact = (a.double() @ b.double()).float()
    try:
        total = wide_product(a.to(dtype), b.to(dtype))
        right = torch.equal(total, exact)
        add_wide_product(total, a.to(dtype), b.to(dtype), keep=True)
        right = right and torch.equal(total, 2 * exact)
    except (RuntimeError, TypeError) as error:
        log.warning("logits are rounded to %s here: %s", dtype, error)
        return False
    if not right:
        log.warning("logits are rounded to %s here: wide products are not right on this device", dtype)
    return right
