"""Attention of one query per row on a CPU, as in decoding: two products, with the queries of a key head together.

torch's own kernel reads keys and values once for every query head, and takes two products per row and head. A batched
product reads them once per key head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def serves_one(query: Tensor, key: Tensor, mask: Tensor | None, more: dict[str, Any]) -> bool:
    """Whether :func:`attend_one` computes what transformers' own function would.

    Args:
        query: [n, heads, queries, d].
        key: [n, key heads, keys, d].
        mask: As transformers gives it.
        more: What else is given to attention.
    """
    on_cpu = query.device.type == "cpu" and query.dtype == key.dtype and query.dtype in (torch.float32, torch.float64)
    additive = mask is None or (mask.dtype == query.dtype and mask.shape[1] == 1)
    known = all(more[name] is None for name in ("position_bias", "softcap", "cache", "s_aux") if name in more)
    return query.shape[2] == 1 and on_cpu and additive and known and not more.get("dropout")


def attend_one(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None) -> Tensor:
    """Attend with one query per head.

    Args:
        query: [n, heads, 1, d].
        key: [n, key heads, keys, d].
        value: [n, key heads, keys, e].
        mask: What is added to the scores [n or 1, 1, 1, keys].
        scaling: Factor on the scores; None: one over the root of d.

    Returns:
        What each head attends to [n, 1, heads, e].
    """
    rows, heads, _, size = query.shape
    together = query.reshape(rows, key.shape[1], -1, size) * (size**-0.5 if scaling is None else scaling)
    scores = torch.matmul(together, key.transpose(2, 3))
    if mask is not None:
        scores = scores + mask
    return torch.matmul(scores.softmax(-1), value).reshape(rows, 1, heads, -1)
