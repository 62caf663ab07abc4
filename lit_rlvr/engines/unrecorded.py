"""Forward passes that autograd knows nothing of: without gradients, it still keeps a record of views and versions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel


@contextmanager
def unrecorded(module: nn.Module) -> Iterator[None]:
    """Inside, on a CPU, nothing is recorded, which spares a small model's pass some percent of its time.

    Tensors that are made inside cannot take part in learning; those that were made before can be written to. Modules
    that are spread over devices are left alone, because the weights that they gather are learnt from later.
    """
    spread = any(isinstance(part, (FSDPModule, FullyShardedDataParallel)) for part in module.modules())
    if spread or any(parameter.device.type != "cpu" for parameter in module.parameters()):
        yield
        return
    try:
        with torch.inference_mode():
            yield
    finally:
        # A rotary embedding may have fitted its frequencies to the longest row.
        for part in module.modules():
            for name, buffer in part.named_buffers(recurse=False):
                if buffer.is_inference():
                    setattr(part, name, buffer.clone())
