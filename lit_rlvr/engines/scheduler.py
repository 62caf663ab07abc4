"""Decoding that keeps the batch full: as rows finish, waiting ones take their place."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from lit_rlvr.engines import whole
from lit_rlvr.engines.decoding import Output, prefill
from lit_rlvr.engines.slots import SPARE, SlotCache
from lit_rlvr.policy import Policy

SIMILAR = 0.75
"""Prompts are prefilled together with one that is at most this much shorter."""


@dataclass
class _Prefilled:
    """Prompts that have been run through the policy, and the rows that still have to begin from them.

    Args:
        logits: What each prompt's first token is drawn from [G, V].
        lengths: Tokens of each prompt [G].
        cache: Keys and values, padded on the left.
        waiting: (prompt among the G, row of the output) of those that have not begun.
    """

    logits: Tensor
    lengths: Tensor
    cache: DynamicCache
    waiting: deque[tuple[int, int]]


class Scheduler:
    """Decodes ``samples`` responses to each prompt, at most ``max_rows`` at a time.

    Each prompt is prefilled once. The longest prompts begin, so that those side by side are of similar length. Tokens
    do not depend on the order of things: random numbers are a function of a row's name and position.

    Args:
        policy: The policy to sample from.
        windows: The attention window of each of its layers; see :func:`lit_rlvr.engines.slots.windows`.
        prompts: Prompt tokens.
        samples: Responses per prompt.
        max_rows: Most rows at a time.
        out: Where tokens are drawn and kept.
    """

    def __init__(
        self,
        policy: Policy,
        windows: list[int | None],
        prompts: Sequence[Sequence[int]],
        samples: int,
        max_rows: int,
        out: Output,
    ) -> None:
        self.policy, self.prompts, self.samples, self.out = policy, prompts, samples, out
        self.slots = min(max_rows, samples * len(prompts))
        self.whole = whole.reads_whole(policy, windows)
        most = max(map(len, prompts)) + out.sampling.max_new_tokens
        self.cache = SlotCache(windows, self.slots, whole.SPARE if self.whole else SPARE, most)
        self.queue = deque(sorted(range(len(prompts)), key=lambda i: -len(prompts[i])))
        self.ready: _Prefilled | None = None
        self.row = torch.zeros(0, dtype=torch.int64, device=policy.device)
        """Row of the output in each slot [n]."""
        self.length = self.row
        """Tokens of each slot in the cache [n]."""
        self.longest, self.shortest = 0, 0

    def run(self) -> None:
        """Decode until nothing is waiting and all have finished."""
        token = self.row
        while True:
            logits = self._advance(token) if len(self.row) else None
            logits = self._admit(logits)
            if logits is None:
                return
            token, done = self.out.draw(logits, self.row)
            token = self._drop(token, done)

    def _waiting(self) -> int:
        return len(self.queue) * self.samples + (len(self.ready.waiting) if self.ready else 0)

    def _admit(self, logits: Tensor | None) -> Tensor | None:
        """Once an eighth of the slots is free, let waiting rows begin: add what their first tokens are drawn from."""
        while (free := self.slots - len(self.row)) >= min(self._waiting(), max(1, self.slots // 8)) > 0:
            if self.ready is None:
                self.ready = self._prefill(-(-free // self.samples))
            ready = self.ready
            taken = [ready.waiting.popleft() for _ in range(min(free, len(ready.waiting)))]
            prompt, row = torch.tensor(taken, device=self.row.device).unbind(-1)
            self.row = torch.cat([self.row, row])
            self._set_lengths(torch.cat([self.length, ready.lengths[prompt]]))
            self.cache.admit(ready.cache, prompt, self.longest)
            logits = ready.logits[prompt] if logits is None else torch.cat([logits, ready.logits[prompt]])
            if not ready.waiting:
                self.ready = None
        return logits

    def _prefill(self, most: int) -> _Prefilled:
        """Prefill up to ``most`` prompts of similar length."""
        picked = [self.queue.popleft()]
        enough = SIMILAR * len(self.prompts[picked[0]])
        while self.queue and len(picked) < most and len(self.prompts[self.queue[0]]) >= enough:
            picked.append(self.queue.popleft())
        logits, mask, cache = prefill(self.policy, [self.prompts[i] for i in picked])
        rows = ((place, i * self.samples + s) for place, i in enumerate(picked) for s in range(self.samples))
        return _Prefilled(logits, mask.sum(-1), cache, deque(rows))

    def _drop(self, token: Tensor, done: Tensor) -> Tensor:
        """Let rows that are done leave; the last rows take their slots. Returns the tokens of those that stay."""
        stays = ~done.cpu()
        count = int(stays.sum())
        if count == len(stays):
            return token
        holes = (~stays[:count]).nonzero().squeeze(-1)
        movers = count + stays[count:].nonzero().squeeze(-1)
        order = torch.arange(count)
        order[holes] = movers
        order, holes, movers = (index.to(token.device) for index in (order, holes, movers))
        self.row = self.row[order]
        self._set_lengths(self.length[order])
        self.cache.keep(holes, movers, count, self.longest)
        return token[order]

    def _advance(self, token: Tensor) -> Tensor:
        """One forward pass of the rows that go on. Returns next-token logits [n, V]."""
        logits = whole.next_logits(self.policy, self.cache, token, self.length) if self.whole else None
        if logits is None:
            logits = self._forward(token)
        self.length = self.length + 1
        self.longest, self.shortest = self.longest + 1, self.shortest + 1
        return logits

    def _forward(self, token: Tensor) -> Tensor:
        """The pass over the columns in use."""
        mask = None
        if self.shortest < self.longest:
            first = self.longest - self.length
            mask = torch.arange(self.longest + 1, device=token.device) >= first[:, None]
        return self.policy.next_logits(token[:, None], mask, self.length[:, None], self.cache)

    def _set_lengths(self, length: Tensor) -> None:
        self.length = length
        self.longest, self.shortest = (int(length.max()), int(length.min())) if len(length) else (0, 0)
