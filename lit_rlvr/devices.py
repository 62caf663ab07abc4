"""Moving what is ready on the CPU to where the model is, without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on ``device``.

    A plain ``.to`` would wait until a GPU has done everything that it was asked for so far, and leave it idle until it
    is asked for more.
    """
    if tensor.device.type != "cpu" or device.type in ("cpu", "mps"):
        return tensor.to(device)
    ready = tensor.pin_memory() if device.type == "cuda" else tensor
    return ready.to(device, non_blocking=True)
