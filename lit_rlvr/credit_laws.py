"""The laws of what a credit callback returns; whoever breaks one is named."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from lit_rlvr.types import Credit


def check_credit(credit: Any, before: Credit, mask: Tensor, author: str) -> None:
    """Check what ``author`` made of the credit ``before`` it, for responses with ``mask`` [B, T].

    Raises:
        ValueError: Naming ``author`` and the broken law.
    """
    if not isinstance(credit, Credit):
        raise ValueError(f"{author} returned {_kind(credit)} from assign, expected a Credit")
    for name in ("advantage", "weight", "count", "kl_coef"):
        value: Tensor | None = getattr(credit, name)
        if value is None:
            continue
        if value.shape != mask.shape:
            raise ValueError(f"{author} returned {name} of shape {tuple(value.shape)}, expected {tuple(mask.shape)}")
        wanted = getattr(before, name)
        if wanted is not None and value.dtype != wanted.dtype:
            raise ValueError(f"{author} returned {name} of {value.dtype}, expected {wanted.dtype}; .to({wanted.dtype})")
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{author} returned a {name} that is not finite")
        if name == "advantage":
            continue
        if bool((value < 0).any()):
            raise ValueError(f"{author} returned a negative {name}")
        if bool(((value != 0) & ~mask).any()):
            raise ValueError(f"{author} returned a {name} other than 0 outside the response")


def check_rewards(rewards: Any, facts: Tensor, author: str) -> None:
    """Check the rewards that ``author`` returned from ``shape_rewards``; ``facts`` [B] are those of the rollout.

    Raises:
        ValueError: Naming ``author`` and the broken law.
    """
    check_shape(rewards, facts, f"{author} must return one finite reward per response from shape_rewards: it returned")
    if not bool(torch.isfinite(rewards).all()):
        raise ValueError(f"{author} must return one finite reward per response from shape_rewards: one is not finite")


def check_shape(value: Any, like: Tensor, what: str) -> None:
    """Check that ``value`` is a tensor of the shape of ``like``; ``what`` begins the sentence.

    One that only broadcasts would be added up over a table of all pairs.

    Raises:
        ValueError: When it is not.
    """
    if not isinstance(value, Tensor):
        raise ValueError(f"{what} {_kind(value)}, expected a tensor of shape {tuple(like.shape)}")
    if value.shape != like.shape:
        raise ValueError(f"{what} a tensor of shape {tuple(value.shape)}, expected {tuple(like.shape)}")


@contextmanager
def unchanged(author: str, *records: Any) -> Iterator[None]:
    """Refuse that ``author`` writes into the tensors of ``records``, which others read too.

    Raises:
        ValueError: Naming ``author`` and the tensor.
    """
    versions = {name: (tensor, tensor._version) for name, tensor in _tensors(records)}
    yield
    for name, (tensor, version) in versions.items():
        if tensor._version != version:
            raise ValueError(f"{author} writes into {name}; return a new tensor, as dataclasses.replace helps to")


def _tensors(records: tuple[Any, ...]) -> Iterator[tuple[str, Tensor]]:
    for record in records:
        if isinstance(record, Tensor):
            yield "rewards", record
            continue
        owner = type(record).__name__
        for field in fields(record):
            value = getattr(record, field.name)
            if isinstance(value, Tensor) and not value.is_inference():  # which keep no count
                yield f"{owner}.{field.name}", value


def _kind(value: Any) -> str:
    return "None" if value is None else type(value).__name__
