"""Decoding that keeps the batch full: as rows finish, waiting ones take their place."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import Cache

from lit_rlvr.engines import graphs, prefill, whole
from lit_rlvr.engines.capture import Recorder
from lit_rlvr.engines.decoding import Output
from lit_rlvr.engines.graph_draws import DrawGraphs
from lit_rlvr.engines.graph_steps import StepGraphs
from lit_rlvr.engines.slots import SPARE, SlotCache
from lit_rlvr.policy import Policy

SIMILAR = 0.75
"""Prompts are prefilled together with one that is at most this much shorter."""


@dataclass
class _Prefilled:
    """Prompts that have been run through the policy, and the rows that still have to begin from them.

    Args:
        logits: What each prompt's first token is drawn from [G, V].
        lengths: Tokens of each prompt.
        cache: Keys and values, padded on the right.
        waiting: (prompt among the G, row of the output) of those that have not begun.
    """

    logits: Tensor
    lengths: list[int]
    cache: Cache
    waiting: deque[tuple[int, int]]


class Scheduler:
    """Decodes ``samples`` responses to each prompt, at most ``max_rows`` at a time.

    Each prompt is prefilled once. The longest prompts begin, so that those side by side are of similar length. Tokens
    do not depend on the order of things: random numbers are a function of a row's name and position.

    Where each row is, is known on the CPU too: a step waits for the device once, when it asks which rows are done.

    Args:
        policy: The policy to sample from.
        windows: The attention window of each of its layers; see :func:`lit_rlvr.engines.slots.windows`.
        prompts: Prompt tokens.
        samples: Responses per prompt.
        max_rows: Most rows at a time.
        out: Where tokens are drawn and kept.
        recorder: Makes what records graphs, for a purpose; None: nothing is recorded.
    """

    def __init__(
        self,
        policy: Policy,
        windows: list[int | None],
        prompts: Sequence[Sequence[int]],
        samples: int,
        max_rows: int,
        out: Output,
        recorder: Callable[[str], Recorder] | None = None,
    ) -> None:
        self.policy, self.prompts, self.samples, self.out = policy, prompts, samples, out
        self.slots = min(max_rows, samples * len(prompts))
        self.whole = whole.reads_whole(policy, windows)
        most = max(map(len, prompts)) + out.sampling.max_new_tokens
        spare = graphs.SPARE if recorder else whole.SPARE if self.whole else SPARE
        self.cache = SlotCache(windows, self.slots, spare, most)
        self.recorder = recorder
        self.graphs: StepGraphs | None = None
        self.queue = deque(sorted(range(len(prompts)), key=lambda i: -len(prompts[i])))
        self.ready: _Prefilled | None = None
        self.row = torch.zeros(0, dtype=torch.int64, device=policy.device)
        """Row of the output in each slot [n]."""
        self.position = self.row
        """Tokens of each slot in the cache [n], which is the position of the next."""
        self.lengths: list[int] = []
        """The same on the CPU."""

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
            begin = [(prompt, row, ready.lengths[prompt]) for prompt, row in taken]
            prompt, row, position = torch.tensor(begin, device=self.row.device).unbind(-1)
            self.row, self.position = torch.cat([self.row, row]), torch.cat([self.position, position])
            self.lengths += [length for _, _, length in begin]
            self.cache.admit(ready.cache, prompt, position, max(self.lengths))
            logits = ready.logits[prompt] if logits is None else torch.cat([logits, ready.logits[prompt]])
            if not ready.waiting:
                self.ready = None
        return logits

    def _prefill(self, most: int) -> _Prefilled:
        """Prefill up to ``most`` prompts of similar length, as far as their tokens fit."""
        picked = [self.queue.popleft()]
        longest = len(self.prompts[picked[0]])
        most, enough = min(most, prefill.TOKENS // longest), SIMILAR * longest
        while self.queue and len(picked) < most and len(self.prompts[self.queue[0]]) >= enough:
            picked.append(self.queue.popleft())
        prompts = [self.prompts[i] for i in picked]
        logits, cache = prefill.prefill(self.policy, prompts, len(self.cache.slots))
        rows = ((place, i * self.samples + s) for place, i in enumerate(picked) for s in range(self.samples))
        return _Prefilled(logits, [len(prompt) for prompt in prompts], cache, deque(rows))

    def _drop(self, token: Tensor, done: list[bool]) -> Tensor:
        """Let rows that are done leave; the last rows take their slots. Returns the tokens of those that stay."""
        count = done.count(False)
        if count == len(done):
            return token
        holes = [slot for slot in range(count) if done[slot]]
        movers = [slot for slot in range(count, len(done)) if not done[slot]]
        taken_by = dict(zip(holes, movers, strict=True))
        order = [taken_by.get(slot, slot) for slot in range(count)]
        index = torch.tensor([*order, *holes, *movers], dtype=torch.int64, device=token.device)
        stay, to, of = index.split([count, len(holes), len(movers)])
        self.row, self.position = self.row[stay], self.position[stay]
        self.lengths = [self.lengths[slot] for slot in order]
        self.cache.keep(to, of, count, max(self.lengths, default=0))
        return token[stay]

    def _advance(self, token: Tensor) -> Tensor:
        """One forward pass of the rows that go on. Returns next-token logits [n, V]."""
        logits = None if self.graphs is None else self.graphs.next_logits(token, self.position)
        if logits is None:
            self.graphs, logits = None, self._forward(token)
            if self.recorder is not None:
                self._begin_graphs(token, logits, self.recorder)
        self.position = self.position + 1
        self.lengths = [length + 1 for length in self.lengths]
        return logits

    def _forward(self, token: Tensor) -> Tensor:
        """The pass, kernel by kernel."""
        logits = whole.next_logits(self.policy, self.cache, token, self.position) if self.whole else None
        if logits is not None:
            return logits
        longest, mask = max(self.lengths), None
        if min(self.lengths) < longest:
            mask = torch.arange(longest + 1, device=token.device) >= (longest - self.position)[:, None]
        return self.policy.next_logits(token[:, None], mask, self.position[:, None], self.cache)

    def _begin_graphs(self, token: Tensor, logits: Tensor, recorder: Callable[[str], Recorder]) -> None:
        """Take graphs for the steps that follow, if the one that was just taken is the same with them."""
        self.recorder = None
        steps = StepGraphs(self.policy, self.cache, logits, partial(recorder, "decoding steps"))
        if steps.agrees(token, self.position, logits):
            self.graphs = steps
            out, draws = self.out, partial(recorder, "draws of tokens")
            out.drawer = DrawGraphs(steps.logits, out.sampling, out.seed, draws)
