"""One way through the language-model head: forward, loss and backward, in a process of its own."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.gate import Gate
from benchmarks.settings import HeadSettings
from lit_rlvr.head import chunked_logprobs, selected_loss


class Work:
    """Hidden states, head, targets, and which tokens learn; the loss is the surrogate of a first update.

    Args:
        settings: Sizes.
    """

    def __init__(self, settings: HeadSettings) -> None:
        device, dtype = settings.device, torch.float32 if settings.device == "cpu" else torch.bfloat16
        generator = torch.Generator().manual_seed(0)
        tokens, width = settings.tokens, settings.hidden
        self.hidden = torch.randn(tokens, width, generator=generator).to(device, dtype).requires_grad_()
        weight = 0.02 * torch.randn(settings.vocabulary, width, generator=generator)
        self.weight = weight.to(device, dtype).requires_grad_()
        self.targets = torch.randint(settings.vocabulary, (tokens,), generator=generator).to(device)
        self.advantage = torch.randn(tokens, generator=generator).to(device)
        order = torch.randperm(tokens, generator=generator)
        self.chosen = order[: -(-int(settings.rho * 10_000) * tokens // 10_000)].sort().values.to(device)

    def surrogate(self, logprobs: Tensor, advantage: Tensor) -> Tensor:
        """Minus ratio times advantage, summed."""
        return -((logprobs - logprobs.detach()).exp() * advantage).sum()

    def full(self) -> Tensor:
        """All logits at once, with entropies, as a plain implementation has them; tokens are masked in the loss."""
        logp = (self.hidden @ self.weight.T).float().log_softmax(-1)
        with torch.no_grad():
            self.entropies = -(logp.exp() * logp).sum(-1)
        mask = torch.zeros_like(self.advantage).index_fill_(0, self.chosen, 1.0)
        return self.surrogate(logp.gather(1, self.targets[:, None]).squeeze(1), self.advantage * mask)

    def chunked(self) -> Tensor:
        """Log-probabilities of every token, in chunks, recomputed in the backward pass."""
        logprobs, self.entropies = chunked_logprobs(self.hidden, self.weight, self.targets)
        mask = torch.zeros_like(self.advantage).index_fill_(0, self.chosen, 1.0)
        return self.surrogate(logprobs, self.advantage * mask)

    def selected(self) -> Tensor:
        """The tokens that learn, and no others."""
        return self._selected(self.chosen)

    def every(self) -> Tensor:
        """The same with every token."""
        return self._selected(torch.arange(len(self.targets), device=self.targets.device))

    def _selected(self, index: Tensor) -> Tensor:
        advantage = self.advantage[index]
        return selected_loss(
            self.hidden[index],
            self.weight,
            self.targets[index],
            lambda logprobs, entropies, part: self.surrogate(logprobs, advantage[part]),
        )


def main(settings: HeadSettings) -> None:
    """Run until the parent says stop."""
    gate, work = Gate(settings.device), Work(settings)
    road: Callable[[], Tensor] = getattr(work, settings.road)

    def once(number: int) -> None:
        work.hidden.grad = work.weight.grad = None
        road().backward()

    gate.repeat(once)


if __name__ == "__main__":
    main(HeadSettings(**json.loads(sys.argv[1])))
