"""What every way of decoding in this process shares: drawing a token, and when a response ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lit_rlvr.engines.base import Generation, Sampling
from lit_rlvr.engines.sampler import Drawn, draw_named
from lit_rlvr.engines.stop_strings import StopStrings


class Output:
    """Preallocated tokens and facts, filled as they are drawn.

    Args:
        tokenizer: For stop strings.
        ends: Tokens that end a response.
        uid: (phase, draw, sample) of every row [B, 3]; everything lies on its device.
        sampling: Temperature, length and truncation.
        seed: The run's seed.
    """

    def __init__(self, tokenizer: Any, ends: Tensor, uid: Tensor, sampling: Sampling, seed: int) -> None:
        rows, width, device = len(uid), sampling.max_new_tokens, uid.device
        self.uid, self.sampling, self.seed = uid, sampling, seed
        self.strings = StopStrings(tokenizer, sampling.stop) if sampling.stop else None
        self.ends = ends.to(device)
        self.ids = torch.zeros(rows, width, dtype=torch.int64, device=device)
        self.logprobs, self.entropies = (torch.zeros(rows, width, device=device) for _ in range(2))
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        self.stopped = torch.zeros(rows, dtype=torch.bool, device=device)
        self.drawer: Callable[[Tensor, Tensor, Sampling, int], Drawn] = draw_named
        self.steps, self.drawn = 0, 0
        """Times that tokens were drawn, and tokens drawn."""

    def draw(self, logits: Tensor, rows: Tensor) -> tuple[Tensor, list[bool]]:
        """Draw the next token of ``rows`` [n] from ``logits`` [n, V].

        Whatever has to be known on the CPU is read at once, because it waits for the device.

        Returns:
            The tokens [n], and whether each ended its response.

        Raises:
            FloatingPointError: When a row of logits holds a NaN, or no finite logit.
        """
        step = self.lengths[rows]
        name = torch.cat([self.uid[rows], step[:, None]], -1)
        token, logprob, entropy, finite = self.drawer(logits, name, self.sampling, self.seed)
        self.ids[rows, step], self.logprobs[rows, step], self.entropies[rows, step] = token, logprob, entropy
        self.lengths[rows] = step + 1
        stopped = torch.isin(token, self.ends)
        self.stopped[rows] = stopped
        self.steps, self.drawn = self.steps + 1, self.drawn + len(rows)
        facts = [stopped | (step + 1 == self.sampling.max_new_tokens), finite]
        if self.strings is None:
            done, fine = torch.stack(facts).tolist()
        else:
            ended, fine, tokens, names = torch.stack([*(fact.to(rows) for fact in facts), token, rows]).tolist()
            done = [end or hit for end, hit in zip(map(bool, ended), self.strings.hit(names, tokens), strict=True)]
        if not all(fine):
            raise FloatingPointError("the policy's logits contain NaN or infinity; the weights have diverged")
        return token, done

    def finish(self) -> Generation:
        """Everything that was drawn."""
        if self.strings is not None:
            self.stopped[torch.tensor(self.strings.rows, dtype=torch.int64, device=self.ids.device)] = True
        width = int(self.lengths.max()) if len(self.lengths) else 0
        mask = torch.arange(width, device=self.ids.device)[None, :] < self.lengths[:, None]
        return Generation(self.ids[:, :width], mask, self.logprobs[:, :width], self.entropies[:, :width], ~self.stopped)
