"""Generation with the policy itself: no second copy of the weights, exact log-probabilities and entropies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from lit_rlvr.engines.base import Engine, Generation, Sampling
from lit_rlvr.engines.sampler import draw
from lit_rlvr.hashing import uniform
from lit_rlvr.policy import Policy
from lit_rlvr.sharding import gathered


class InProcessEngine(Engine):
    """Samples from the policy module in this process.

    Each prompt is prefilled once and its cache is repeated over the group; rows leave the batch as they finish. Every
    random number is a function of (seed, phase, draw, sample, position), so responses do not depend on how rows are
    batched or spread over ranks.

    Args:
        max_rows: Most responses decoded at a time; bounds the memory of the key-value cache.

    Raises:
        ValueError: For ``max_rows`` below 1.
    """

    def __init__(self, max_rows: int = 256) -> None:
        if max_rows < 1:
            raise ValueError(f"engine.max_rows must be at least 1, got {max_rows}")
        self.max_rows = max_rows

    def exact(self, precision: str) -> bool:
        return precision in ("32-true", "32", "64-true", "64")

    @torch.no_grad()
    def generate(
        self,
        policy: Policy,
        tokenizer: Any,
        prompts: Sequence[Sequence[int]],
        uid: Tensor,
        sampling: Sampling,
        seed: int,
    ) -> Generation:
        longest = max((len(p) for p in prompts), default=0)
        limit = policy.context_length
        if limit is not None and longest + sampling.max_new_tokens > limit:
            raise ValueError(
                f"a prompt of {longest} tokens and max_new_tokens={sampling.max_new_tokens} exceed the model's "
                f"context of {limit} tokens; lower max_new_tokens or max_prompt_tokens"
            )
        samples = len(uid) // max(len(prompts), 1)
        assert samples * len(prompts) == len(uid)
        assert all(prompts)
        uid = uid.to(policy.device)
        out = _Output(len(uid), sampling.max_new_tokens, policy.device)
        was_training = policy.training
        policy.eval()
        try:
            with gathered(policy):
                for chunk, rows in self._chunks(len(prompts), samples):
                    picked = [prompts[i] for i in chunk]
                    _decode(policy, tokenizer, picked, rows.to(policy.device), uid, sampling, seed, out)
        finally:
            policy.train(was_training)
        return out.finish()

    def _chunks(self, prompts: int, samples: int) -> Iterator[tuple[range, Tensor]]:
        """Prompts that are decoded together, and their output rows: at most ``max_rows`` at a time."""
        together = max(1, self.max_rows // max(samples, 1))
        for start in range(0, prompts, together):
            chunk = range(start, min(start + together, prompts))
            for first in range(0, samples, self.max_rows):
                share = torch.arange(first, min(first + self.max_rows, samples))
                yield chunk, (torch.tensor(chunk)[:, None] * samples + share).flatten()


class _Output:
    """Preallocated tokens and facts, filled column by column."""

    def __init__(self, rows: int, width: int, device: torch.device) -> None:
        self.ids = torch.zeros(rows, width, dtype=torch.int64, device=device)
        self.logprobs, self.entropies = (torch.zeros(rows, width, device=device) for _ in range(2))
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        self.stopped = torch.zeros(rows, dtype=torch.bool, device=device)

    def finish(self) -> Generation:
        width = int(self.lengths.max()) if len(self.lengths) else 0
        mask = torch.arange(width, device=self.ids.device)[None, :] < self.lengths[:, None]
        return Generation(self.ids[:, :width], mask, self.logprobs[:, :width], self.entropies[:, :width], ~self.stopped)


def _decode(
    policy: Policy,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    rows: Tensor,
    uid: Tensor,
    sampling: Sampling,
    seed: int,
    out: _Output,
) -> None:
    """Prefill ``prompts``, repeat them over their output ``rows``, side by side, and decode until all have stopped."""
    samples = len(rows) // len(prompts)
    ids, mask = left_pad(prompts, policy.device)
    cache = DynamicCache(config=policy.hf.config)
    padded = not bool(mask.all())
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    logits = policy.next_logits(ids, mask if padded else None, positions, cache)
    cache.batch_repeat_interleave(samples)
    logits, mask = (t.repeat_interleave(samples, 0) for t in (logits, mask))
    position = mask.sum(-1)
    ends = end_tokens(policy, tokenizer).to(policy.device)
    for step in range(sampling.max_new_tokens):
        phase, drawn_at, sample = uid[rows].unbind(-1)
        token, logprob, entropy = draw(logits, sampling, uniform(seed, phase, drawn_at, sample, step))
        out.ids[rows, step], out.logprobs[rows, step], out.entropies[rows, step] = token, logprob, entropy
        out.lengths[rows] = step + 1
        done = torch.isin(token, ends) | _hit_stop_string(tokenizer, out.ids[rows, : step + 1], sampling.stop)
        out.stopped[rows[done]] = True
        if bool(done.all()) or step + 1 == sampling.max_new_tokens:
            return
        if bool(done.any()):
            keep = (~done).nonzero().squeeze(-1)
            cache.batch_select_indices(keep)
            rows, token, mask, position = rows[keep], token[keep], mask[keep], position[keep]
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        logits = policy.next_logits(token[:, None], mask if padded else None, position[:, None], cache)
        position = position + 1


def left_pad(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and mask [G, P], padded on the left."""
    width = max(len(p) for p in prompts)
    ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    return ids, torch.arange(width, device=device)[None, :] >= width - lengths[:, None]


def end_tokens(policy: Policy, tokenizer: Any) -> Tensor:
    """Every token that ends a response: the tokenizer's, the model's and its generation configuration's."""
    ends: set[int] = set()
    for source in (tokenizer, policy.hf.config, policy.hf.generation_config):
        value = getattr(source, "eos_token_id", None)
        ends.update(value if isinstance(value, list) else [] if value is None else [value])
    return torch.tensor(sorted(ends), dtype=torch.int64)


def _hit_stop_string(tokenizer: Any, ids: Tensor, stop: list[str]) -> Tensor:
    """Whether the text's end contains a stop string [n]; the window is wide enough for four tokens per character."""
    if not stop:
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    window = 4 * max(len(s) for s in stop) + 4
    texts = tokenizer.batch_decode(ids[:, -window:])
    return torch.tensor([any(s in text for s in stop) for text in texts], device=ids.device)
