"""Decoding over transformers' own growing cache: for every architecture, and what the faster way must equal."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

from lit_rlvr.engines.decoding import Output
from lit_rlvr.policy import Policy


def decode(policy: Policy, prompts: Sequence[Sequence[int]], samples: int, max_rows: int, out: Output) -> None:
    """Decode ``samples`` responses to each prompt, at most ``max_rows`` at a time, one batch after the other."""
    together = max(1, max_rows // samples)
    for start in range(0, len(prompts), together):
        chunk = torch.arange(start, min(start + together, len(prompts)))
        for first in range(0, samples, max_rows):
            share = torch.arange(first, min(first + max_rows, samples))
            rows = (chunk[:, None] * samples + share).flatten().to(policy.device)
            _decode_batch(policy, prompts[start : start + together], rows, out)


def _decode_batch(policy: Policy, prompts: Sequence[Sequence[int]], rows: Tensor, out: Output) -> None:
    """Prefill ``prompts``, repeat them over their output ``rows``, side by side, and decode until all have stopped."""
    samples = len(rows) // len(prompts)
    logits, mask, cache = _prefill(policy, prompts)
    padded = not bool(mask.all())
    cache.batch_repeat_interleave(samples)
    logits, mask = (t.repeat_interleave(samples, 0) for t in (logits, mask))
    position = mask.sum(-1)
    while True:
        token, done = out.draw(logits, rows)
        if all(done):
            return
        if any(done):
            keep = torch.tensor([row for row, ended in enumerate(done) if not ended], device=rows.device)
            cache.batch_select_indices(keep)
            rows, token, mask, position = rows[keep], token[keep], mask[keep], position[keep]
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        logits = policy.next_logits(token[:, None], mask if padded else None, position[:, None], cache)
        position = position + 1


def _prefill(policy: Policy, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, DynamicCache]:
    """Run prompts through the policy, on the left of what follows: layers may keep a state that padding would change.

    Returns:
        Next-token logits [G, V], the mask of the prompts, which are padded on the left [G, P], and their cache.
    """
    width, device = max(len(p) for p in prompts), policy.device
    ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    mask = torch.arange(width, device=device)[None, :] >= width - lengths[:, None]
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    cache = DynamicCache(config=policy.hf.config)
    padded = min(len(p) for p in prompts) < width
    return policy.next_logits(ids, mask if padded else None, positions, cache), mask, cache
