"""What there is to do about a device's memory: moving tensors there without waiting, and giving back what is unused."""

from __future__ import annotations

import gc

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


def give_back_unused(device: torch.device) -> None:
    """Let other processes have the memory of ``device`` that no tensor takes any more.

    PyTorch keeps what it has once had, up to the peak of training, and only itself can use it.
    """
    if device.type != "cpu":
        gc.collect()  # tensors that refer to each other are still there
        torch.get_device_module(device).empty_cache()
