"""The last decoder layer computes only what is read: behind it no token sees another.

Of tokens whose hidden states nobody reads it needs keys and values alone. Its other linear layers take each token by
itself, so they are given those that are read, and their outputs are zero elsewhere; what then comes out of the layer
at the other places means nothing, and has no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_rlvr.segments import Pack

ATTENTION = ("self_attn", "attn")
"""Names of the attention in a decoder layer."""

ROWWISE = ("self_attn.q_proj", "self_attn.o_proj", "attn.c_proj", "mlp")
"""Names of what takes each token by itself, and of which keys and values do not depend."""

WORTH = 0.75
"""Share of the places up to which leaving out the others saves more than picking costs."""


def places_read(index: Tensor, total: int) -> Tensor | None:
    """The places that ``index`` names, each once and in order; None: nearly all of ``total``, so all may be computed.

    >>> places_read(torch.tensor([5, 2, 5]), 8)
    tensor([2, 5])
    """
    named = torch.zeros(total, dtype=torch.bool)
    named[index] = True
    places = named.nonzero().squeeze(1)
    return places if len(places) <= WORTH * total else None


def read_only(hf: PreTrainedModel) -> None:
    """Have the last decoder layer of a model compute only what a pack says is read; without a pack it is as before.

    A fused projection of queries, keys and values stays as it is.
    """
    names = set(hf._no_split_modules or [])
    layers = [module for module in hf.modules() if type(module).__name__ in names]
    if not layers:
        return
    rows = _Rows()
    for name, module in layers[-1].named_modules():
        if name in ATTENTION:
            module.register_forward_pre_hook(rows.look, with_kwargs=True)
        elif name in ROWWISE:
            module.register_forward_pre_hook(rows.pick)
            module.register_forward_hook(rows.put)


class _Rows:
    """Hooks of one layer, which know what is read of the pack that it computes.

    They are told by the call of the attention, which is before the others in every pass of the layer, also where the
    backward pass computes it again while later packs have been through it.
    """

    def __init__(self) -> None:
        self.read: Tensor | None = None
        self.total = 0

    def look(self, attention: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        pack: Pack | None = kwargs.get("pack")
        self.read, self.total = (None, 0) if pack is None else (pack.read, pack.positions.shape[1])

    def pick(self, module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
        """Of [1, total, D] what is read [1, m, D]."""
        return None if self.read is None else (args[0].index_select(1, self.read),)

    def put(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        """[1, m, D] to where it is read in zeros [1, total, D]."""
        if self.read is None:
            return None
        return output.new_zeros(1, self.total, output.shape[2]).index_copy_(1, self.read, output)
