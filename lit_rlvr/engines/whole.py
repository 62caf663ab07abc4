"""Decoding steps on a CPU that read the cache's storage from end to end, behind a mask.

The columns in use of each head are a piece of the storage, and between two pieces is what is not in use yet. With gaps
of half a kilobyte or more, a product over the pieces took twice as long as one over everything. So attention is given
all columns, and a mask for those that a row does not see.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Cache

from lit_rlvr.engines.slots import SlotCache, WholeLayer
from lit_rlvr.policy import Policy
from lit_rlvr.segments import NAME

SPARE = 16
"""Columns that storage grows by at the least; whatever is not in use is read in vain."""


def reads_whole(policy: Policy, windows: list[int | None]) -> bool:
    """Whether decoding steps of a policy, with these windows of its layers, are taken by :func:`next_logits`."""
    attention = policy.hf.config.get_text_config()._attn_implementation
    plain = policy.hf.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled("cpu")
    return policy.device.type == "cpu" and plain and attention == NAME and not any(windows)


def next_logits(policy: Policy, cache: SlotCache, token: Tensor, position: Tensor) -> Tensor | None:
    """Extend the cache by ``token`` [n] at ``position`` [n]; returns logits [n, V].

    Returns None, and does nothing, where less than half of the storage is in use.
    """
    first = cache.slots[0]
    if 2 * (first.high - first.low) < cache.width:
        return None
    column = cache.extend()
    places = torch.arange(cache.width)
    unseen = (places < column - position[:, None]) | (places > column)
    mask = torch.zeros(unseen.shape, dtype=policy.hf.dtype).masked_fill_(unseen, -torch.inf)[:, None, None]
    whole = Cache(layers=[WholeLayer(layer, layer.rows, column) for layer in cache.slots])
    return policy.next_logits(token[:, None], mask, position[:, None], whole)
