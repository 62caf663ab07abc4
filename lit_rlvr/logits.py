"""What stands between a model's hidden states times its head and the distribution that is sampled from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel


@dataclass(frozen=True)
class LogitTransform:
    """What stands between ``hidden @ weight.T`` and the distribution that is sampled from.

    Args:
        scale: Factor on the raw logits.
        softcap: The cap c of z <- c tanh(z / c), or None.
        temperature: Sampling temperature, > 0.
    """

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    def __call__(self, raw: Tensor) -> Tensor:
        z = raw if raw.dtype == torch.float64 else raw.float()  # raw itself may be returned: the caller owns it
        if self.scale != 1.0:
            z = z * self.scale
        if self.softcap is not None:
            z = self.softcap * torch.tanh(z / self.softcap)
        return z / self.temperature if self.temperature != 1.0 else z

    def through(self, gradient: Tensor, shifted: Tensor, top: Tensor) -> Tensor:
        """Take a gradient back to the raw logits, in place; the transformed logits are ``shifted + top``."""
        if self.softcap is not None:
            gradient.mul_(1 - ((shifted + top) * (self.temperature / self.softcap)) ** 2)
        factor = self.scale / self.temperature
        return gradient if factor == 1.0 else gradient.mul_(factor)


def logit_transform(hf: PreTrainedModel) -> LogitTransform:
    """Read the scaling and soft-cap that the model applies to its logits from its configuration."""
    config = hf.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    return LogitTransform(scale, None if softcap is None else float(softcap))
