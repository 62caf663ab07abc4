"""What flows through a run: prompts, rollouts and credit.

Legend, used in every docstring of this package:

* ``B`` rows: one row is one response; the responses to one prompt form a *group*.
* ``P`` prompt tokens and ``T`` response tokens, both padded on the right.
* Log-probabilities and entropies are in nats, of the distribution at the sampling temperature.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

from lit_rlvr.tasks.base import Prompt

UID_LIMITS = {"draw": 1 << 24, "sample": 1 << 15, "position": 1 << 24}
"""Exclusive upper bounds of what :meth:`RolloutBatch.token_order` packs into one 63-bit integer."""


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt and its tokens, as the model reads them."""

    prompt: Prompt
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class _Tensors:
    """A frozen record whose tensors move together."""

    def _map(self, fn: Any) -> Self:
        changed = {f.name: fn(v) for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}
        return replace(self, **changed)

    def to(self, device: torch.device | str) -> Self:
        """Return the same record with every tensor on ``device``."""
        return self._map(lambda tensor: tensor.to(device))

    def rows(self, index: Tensor) -> Self:
        """Return the rows that ``index`` [n] names, in its order."""
        return self._map(lambda tensor: tensor[index.to(tensor.device)])


@dataclass(frozen=True)
class RolloutBatch(_Tensors):
    """The facts of a rollout phase. Never edited; callbacks read it and write :class:`Credit`.

    Args:
        prompt_ids: Prompt tokens [B, P].
        prompt_mask: True on prompt tokens [B, P].
        response_ids: Response tokens, the end-of-sequence token included [B, T].
        response_mask: True on response tokens [B, T].
        old_logprobs: Log-probabilities of the response under the policy that the phase began with [B, T].
        entropies: Entropy of that policy's full distribution at each response token [B, T].
        rewards: What learning maximises, after reward shaping [B].
        correct: The verified outcome: 1 right, 0 wrong [B].
        group: Which prompt of the phase a row answers [B]; equal to the draw in ``uid``.
        uid: (phase, draw, sample) [B, 3]; unique, and independent of row order and of the number of ranks.
        truncated: True where the length limit ended the response [B].
        ref_logprobs: Log-probabilities under the reference model [B, T], where something asked for them.
        engine_logprobs: Log-probabilities that the engine reported [B, T], where they are not ``old_logprobs``.
        values: The critic's value of the state before each response token [B, T], where there is a critic.
        prompts: The group's prompt, one per row.
        texts: The decoded responses, one per row.

    Raises:
        ValueError: When shapes do not fit together.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    response_ids: Tensor
    response_mask: Tensor
    old_logprobs: Tensor
    entropies: Tensor
    rewards: Tensor
    correct: Tensor
    group: Tensor
    uid: Tensor
    truncated: Tensor
    ref_logprobs: Tensor | None = None
    engine_logprobs: Tensor | None = None
    values: Tensor | None = None
    prompts: tuple[Prompt, ...] = ()
    texts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        rows, length = self.response_ids.shape
        expected: dict[str, tuple[int, ...]] = {
            "prompt_ids": (rows, self.prompt_ids.shape[-1]),
            "prompt_mask": (rows, self.prompt_ids.shape[-1]),
            "uid": (rows, 3),
            **dict.fromkeys(("response_mask", "old_logprobs", "entropies"), (rows, length)),
            **dict.fromkeys(("ref_logprobs", "engine_logprobs", "values"), (rows, length)),
            **dict.fromkeys(("rewards", "correct", "group", "truncated"), (rows,)),
        }
        for name, shape in expected.items():
            tensor = getattr(self, name)
            if tensor is not None and tuple(tensor.shape) != shape:
                raise ValueError(f"RolloutBatch.{name} has shape {tuple(tensor.shape)}, expected {shape}")
        for name in ("prompt_mask", "response_mask", "truncated"):
            if getattr(self, name).dtype != torch.bool:
                raise ValueError(f"RolloutBatch.{name} must be a bool tensor, got {getattr(self, name).dtype}")
        for name in ("prompts", "texts"):
            if getattr(self, name) and len(getattr(self, name)) != rows:
                raise ValueError(f"RolloutBatch.{name} has {len(getattr(self, name))} entries for {rows} rows")

    def __len__(self) -> int:
        return self.response_ids.shape[0]

    @property
    def lengths(self) -> Tensor:
        """Response lengths in tokens [B]."""
        return self.response_mask.sum(-1)

    def rows(self, index: Tensor) -> Self:
        """Return the rows that ``index`` [n] names, texts and prompts included."""
        picked = index.tolist()
        bare = replace(self, prompts=(), texts=())  # their number is checked against the rows
        return replace(
            bare._map(lambda tensor: tensor[index.to(tensor.device)]),
            prompts=tuple(self.prompts[i] for i in picked) if self.prompts else (),
            texts=tuple(self.texts[i] for i in picked) if self.texts else (),
        )

    def token_order(self) -> Tensor:
        """Return a unique 63-bit integer for every token [B, T], by (position, draw, sample).

        It names a token independently of row order, padding and ranks, so ties can be broken by it.
        """
        positions = torch.arange(self.response_ids.shape[1], device=self.uid.device)
        for name, largest in (
            ("draw", self.uid[:, 1].max() if len(self) else 0),
            ("sample", self.uid[:, 2].max() if len(self) else 0),
            ("position", self.response_ids.shape[1] - 1),
        ):
            if int(largest) >= UID_LIMITS[name]:
                raise ValueError(f"{name} {int(largest)} is beyond the supported {UID_LIMITS[name] - 1}")
        return (positions << 39)[None, :] + (self.uid[:, 1, None] << 15) + self.uid[:, 2, None]

    @classmethod
    def concatenate(cls, parts: Sequence[RolloutBatch]) -> RolloutBatch:
        """Join batches row-wise, padding prompts and responses on the right to the widest."""
        if len(parts) == 1:
            return parts[0]
        joined: dict[str, Any] = {}
        for f in fields(cls):
            values = [getattr(part, f.name) for part in parts]
            if isinstance(values[0], Tensor):
                joined[f.name] = pad_rows(values)
            elif isinstance(values[0], tuple):
                joined[f.name] = tuple(item for value in values for item in value)
            else:
                joined[f.name] = None
        return cls(**joined)


@dataclass(frozen=True)
class Credit(_Tensors):
    """Which tokens learn, and how much.

    The policy loss is ``-sum(weight * surrogate(advantage, ratio) - kl_coef * |log ratio|) / denominator``, over a
    whole optimiser mini-batch and all ranks; ``ratio`` is that of the current to the old policy. ``weight`` and
    ``count`` start at the aggregation's share of a token: 1, or 1 / length of its response. The denominator is
    ``sum(count)``; that of :class:`~lit_rlvr.aggregation.ConstantLength` does not depend on ``count``.

    Args:
        advantage: Signed advantage of each token [B, T].
        weight: Factor on the token's surrogate in the numerator, >= 0, and 0 off the response [B, T].
        count: Share of the token in the denominator, >= 0, and 0 off the response [B, T].
        kl_coef: How strongly a token's probability is kept close to that of the old policy, >= 0, and 0 off the
            response [B, T]; None: not at all.

    Raises:
        ValueError: When the shapes differ.
    """

    advantage: Tensor
    weight: Tensor
    count: Tensor
    kl_coef: Tensor | None = None

    def __post_init__(self) -> None:
        given = [t for t in (self.advantage, self.weight, self.count, self.kl_coef) if t is not None]
        if len({t.shape for t in given}) > 1:
            raise ValueError(f"Credit needs tensors of one shape [B, T], got {[tuple(t.shape) for t in given]}")

    @property
    def learns(self) -> Tensor:
        """True on tokens that have a gradient of their own [B, T]."""
        learns = (self.weight > 0) & (self.advantage != 0)
        return learns if self.kl_coef is None else learns | (self.kl_coef > 0)


@dataclass(frozen=True)
class Current:
    """What the policy that is being trained says of responses, without gradients; 0 off the mask.

    Args:
        logprobs: Log-probabilities of the response tokens [B, T].
        entropies: Entropies at the response tokens [B, T].
    """

    logprobs: Tensor
    entropies: Tensor


@dataclass(frozen=True)
class Tokens:
    """Response tokens under the policy that is being trained, in no particular order.

    Args:
        logprobs: Log-probabilities, with gradients [m].
        entropies: Entropies, with gradients [m].
        old_logprobs: Log-probabilities under the policy that the phase began with [m].
        advantage: Advantages after all callbacks [m].
    """

    logprobs: Tensor
    entropies: Tensor
    old_logprobs: Tensor
    advantage: Tensor


def pad_rows(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate along rows after padding the last dimension with zeros on the right.

    >>> pad_rows([torch.ones(1, 1), torch.ones(1, 2)])
    tensor([[1., 0.],
            [1., 1.]])
    """
    if parts[0].dim() == 1:
        return torch.cat(list(parts))
    width = max(part.shape[-1] for part in parts)
    return torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[-1])) for part in parts])
