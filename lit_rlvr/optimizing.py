"""Policy and critic under one optimizer: two groups of parameters, measured and clipped apart."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_rlvr.critic import Critic

NAMES = ("grad_norm", "critic_grad_norm")


def parameter_groups(policy: nn.Module, critic: nn.Module | None, settings: Critic | None) -> list[Any]:
    """What the optimizer is made from: the policy's parameters that are trained, and the critic's as a second group."""
    parameters = [p for p in policy.parameters() if p.requires_grad]
    if critic is None or settings is None:
        return parameters
    rate = {} if settings.lr is None else {"lr": settings.lr}
    return [{"params": parameters}, {"params": list(critic.parameters()), **rate}]


def gradient_norms(optimizer: Optimizer) -> dict[str, float]:
    """Norms before clipping, as ``train/grad_norm`` and ``train/critic_grad_norm``."""
    groups = zip(NAMES, optimizer.param_groups, strict=False)
    return {f"train/{name}": total_norm(group["params"]) for name, group in groups}


def total_norm(parameters: Iterable[Tensor]) -> float:
    """The 2-norm of all gradients over all ranks; every rank calls it."""
    norm: Any = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def clip_apart(optimizer: Optimizer, largest: float) -> None:
    """Clip each group's gradient to the norm ``largest``."""
    for group in optimizer.param_groups:
        torch.nn.utils.clip_grad_norm_(group["params"], largest)
