"""Prompts run through the policy before rows are decoded from them: so many at a time as memory has room for.

They are padded on the right, where causal attention does not look: it needs no mask, which would cost the square of
their length, and with which transformers repeats keys and values for every query head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from lit_rlvr.policy import Policy

TOKENS = 2**14
"""Most tokens at a time, padding included; a prompt that is longer is alone."""


def prefill(policy: Policy, prompts: Sequence[Sequence[int]], layers: int) -> tuple[Tensor, Cache]:
    """Run prompts through a policy with so many layers, each of which keeps keys and values.

    Returns:
        Next-token logits [G, V], and the keys and values, padded on the right. Layers with a window keep all of them
        too: which ones are in a row's window depends on its length.
    """
    width, device = max(len(p) for p in prompts), policy.device
    ids = torch.tensor([[*p, *[0] * (width - len(p))] for p in prompts], device=device)
    last = torch.tensor([len(p) - 1 for p in prompts], device=device)
    positions = torch.arange(width, device=device).expand(len(prompts), -1)
    cache = Cache(layers=[DynamicLayer() for _ in range(layers)])
    return policy.next_logits(ids, None, positions, cache, last), cache
