"""One pass over the logits gives the next token, its log-probability and the exact entropy."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lit_rlvr.engines.base import Sampling
from lit_rlvr.hashing import uniform

BLOCK = 256
CACHED = 2**18
"""Logits taken at a time on a CPU, so that what is between two operations stays in its cache."""
READABLE = ("cpu",)
"""Devices of which a number can be read without waiting for what is still being computed."""


class Drawn(NamedTuple):
    """Next tokens [n], their log-probabilities [n] and the entropies [n] of the full distribution, in nats.

    A row is ``finite`` [n] unless it holds a NaN, or no finite logit; what is drawn from it then is some token.
    """

    token: Tensor
    logprob: Tensor
    entropy: Tensor
    finite: Tensor


def draw(logits: Tensor, sampling: Sampling, uniforms: Tensor) -> Drawn:
    """Draw a token per row.

    Log-probability and entropy belong to the full distribution at the sampling temperature (at 1 when greedy), whatever
    top-p or top-k leave of it.

    Args:
        logits: Next-token logits [n, V].
        sampling: Temperature and truncation.
        uniforms: One number in [0, 1) per row [n], float64; not used when greedy.
    """
    part = max(1, CACHED // logits.shape[-1])
    with torch.autocast(logits.device.type, enabled=False):  # which would round what entropies are the sums of
        if logits.device.type != "cpu" or len(logits) <= part:
            return _draw(logits, sampling, uniforms)
        pairs = zip(logits.split(part), uniforms.split(part), strict=True)
        parts = [_draw(some, sampling, their_uniforms) for some, their_uniforms in pairs]
        return Drawn(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def draw_named(logits: Tensor, name: Tensor, sampling: Sampling, seed: int) -> Drawn:
    """Draw a token per row with its own random number.

    Args:
        logits: Next-token logits [n, V].
        name: (phase, draw, sample, position in the response) of each row [n, 4].
        sampling: Temperature and truncation.
        seed: The run's seed.
    """
    return draw(logits, sampling, uniform(seed, *name.unbind(-1)))


def _draw(logits: Tensor, sampling: Sampling, uniforms: Tensor) -> Drawn:
    z = logits.float()
    if sampling.temperature not in (0, 1):
        z = z / sampling.temperature
    z = z - z.amax(-1, keepdim=True)
    p = z.exp()
    total = p.sum(-1)
    entropy = total.log() - _weighted(p, z) / total
    if sampling.temperature == 0:
        token = z.argmax(-1)
    else:
        token = inverse_cdf(_truncate(p, total, sampling), uniforms)
    logprob = z.gather(-1, token[:, None]).squeeze(-1) - total.log()
    return Drawn(token, logprob, entropy, torch.isfinite(total))


def _weighted(p: Tensor, z: Tensor) -> Tensor:
    """Sum of p z per row [n]. 0 * -inf is NaN where a logit is masked out, so such logits are lifted to a number."""
    if z.device.type in READABLE:
        weighted: Tensor = torch.linalg.vecdot(p, z)
        if bool(torch.isfinite(weighted).all()):
            return weighted
    lifted: Tensor = torch.linalg.vecdot(p, z.clamp(min=-1e30))
    return lifted


def inverse_cdf(p: Tensor, uniforms: Tensor) -> Tensor:
    """Index [n] at which the cumulative sum of unnormalised ``p`` [n, V] passes ``uniforms`` [n] of its total.

    Two levels, blocks and then one block, in float64: a float32 running sum over a large vocabulary loses the tail.
    """
    rows, vocabulary = p.shape
    missing = -vocabulary % BLOCK
    padded = (torch.nn.functional.pad(p, (0, missing)) if missing else p).view(rows, -1, BLOCK)
    blocks = padded.sum(-1, dtype=torch.float64).cumsum(-1)
    goal = uniforms.to(blocks) * blocks[:, -1]
    block = _first_above(blocks, goal)
    before = blocks.gather(1, (block - 1).clamp(min=0)[:, None]).squeeze(1).masked_fill(block == 0, 0.0)
    inside = padded[torch.arange(rows, device=p.device), block].double().cumsum(-1)
    return block * BLOCK + _first_above(inside, goal - before)


def _first_above(cumulative: Tensor, goal: Tensor) -> Tensor:
    """First index whose cumulative sum exceeds ``goal``; never one past the last that has mass (rounding)."""
    last_with_mass = (cumulative < cumulative[:, -1:]).sum(-1)
    return torch.minimum((cumulative <= goal[:, None]).sum(-1), last_with_mass)


def _truncate(p: Tensor, total: Tensor, sampling: Sampling) -> Tensor:
    if sampling.top_k and sampling.top_k < p.shape[-1]:
        kth = p.topk(sampling.top_k, dim=-1).values[:, -1:]
        p = p.masked_fill(p < kth, 0.0)
        total = p.sum(-1)
    if sampling.top_p < 1:
        ordered, order = p.sort(-1, descending=True)
        before = (ordered.cumsum(-1) - ordered) / total[:, None]
        p = torch.zeros_like(p).scatter(-1, order, ordered.masked_fill(before >= sampling.top_p, 0.0))
    return p
