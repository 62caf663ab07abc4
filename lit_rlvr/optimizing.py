"""Policy and critic under one optimizer: two groups of parameters, measured and clipped apart."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_rlvr.critic import Critic
from lit_rlvr.reduce import Reduce

NAMES = ("grad_norm", "critic_grad_norm")


@contextmanager
def said_about(option: str) -> Iterator[None]:
    """Name ``option`` in what its class says of arguments that it refuses."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise ValueError(f"{option}: {error}") from error


def parameter_groups(policy: nn.Module, critic: nn.Module | None, settings: Critic | None) -> list[Any]:
    """What the optimizer is made from: the policy's parameters that are trained, and the critic's as a second group."""
    parameters = [p for p in policy.parameters() if p.requires_grad]
    if critic is None or settings is None:
        return parameters
    rate = {} if settings.lr is None else {"lr": settings.lr}
    return [{"params": parameters}, {"params": list(critic.parameters()), **rate}]


def gradient_norms(optimizer: Optimizer, pieces: Reduce | None = None) -> dict[str, float]:
    """Norms before clipping, as ``train/grad_norm`` and ``train/critic_grad_norm``; see :func:`total_norm`."""
    groups = zip(NAMES, optimizer.param_groups, strict=False)
    return {f"train/{name}": total_norm(group["params"], pieces) for name, group in groups}


def total_norm(parameters: Iterable[Tensor], pieces: Reduce | None = None) -> float:
    """The 2-norm of all gradients over all ranks; every rank calls it.

    Args:
        parameters: They hold the gradients.
        pieces: Adds squares over ranks, where gradients are plain tensors with this rank's pieces (the first FSDP).
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm: Any = torch.nn.utils.get_total_norm(gradients)
    if pieces is not None:
        return float(pieces.sum(norm.double() ** 2).sqrt())
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def clip_apart(optimizer: Optimizer, largest: float, pieces: Reduce | None = None) -> None:
    """Clip each group's gradient to the norm ``largest``; see :func:`total_norm`."""
    for group in optimizer.param_groups:
        if pieces is None:
            torch.nn.utils.clip_grad_norm_(group["params"], largest)
        else:
            norm = torch.tensor(total_norm(group["params"], pieces), dtype=torch.float64)
            torch.nn.utils.clip_grads_with_norm_(group["params"], largest, norm)
