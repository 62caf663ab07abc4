"""The language-model head, in chunks of rows: [tokens, vocabulary] never exists as a whole.

Two roads to the same numbers:

* :func:`chunked_logprobs` returns log-probabilities and entropies and recomputes the logits in the backward pass.
* :func:`selected_loss` takes a token-separable loss, and computes its gradient during the forward pass. Called on the
  hidden states of the tokens that learn, it costs nothing for those that do not.

With z the logits after scaling, soft-cap and temperature, p = softmax(z) and H its entropy:
d logp_target / dz = onehot(target) - p, and dH / dz = -p (log p + H).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lit_rlvr.logits import LogitTransform
from lit_rlvr.products import add_wide_product, wide_product, widens

CHUNK_ROWS = {"cpu": 256, "cuda": 1024}
"""Rows of logits held at a time, by the kind of device; their memory is a few times rows x vocabulary x 4 bytes.

Each chunk reads and writes the gradient of the whole weight, which on a GPU takes as long as the products of so many
rows."""


class TokenLoss(Protocol):
    """A loss that is a sum over tokens, so that its gradient can be taken chunk by chunk."""

    def __call__(self, logprobs: Tensor, entropies: Tensor, part: slice) -> Tensor:
        """Summed loss (a scalar) of the tokens ``part``, whose log-probabilities and entropies are given [m]."""
        ...


class _Chunk(NamedTuple):
    """Rows ``part`` of the logits, ``shifted`` by their largest (``top``), and what follows from them.

    ``exponentials`` of them add up to ``total``.
    """

    part: slice
    shifted: Tensor
    top: Tensor
    total: Tensor
    exponentials: Tensor
    logp: Tensor
    entropy: Tensor


class _Head(NamedTuple):
    """The tensors of one call, already in the dtype of the matrix product."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    transform: LogitTransform
    chunk: int
    widens: bool

    def chunks(self) -> Iterator[_Chunk]:
        """The chunks, one after the other; each takes the memory of the one before."""
        rows = len(self.targets)
        # Of even size: a small last chunk would make thin matrix products.
        size = -(-rows // max(1, -(-rows // self.chunk)))
        wide = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        logits = self.weight.new_empty(size, len(self.weight), dtype=wide if self.widens else None)
        exponentials, products = (torch.empty_like(logits, dtype=wide) for _ in range(2))
        for start in range(0, rows, max(1, size)):
            part = slice(start, min(start + size, rows))
            number = part.stop - start
            z = self.transform(self._raw(part, logits[:number]))
            top = z.amax(-1, keepdim=True)
            # Everything is relative to the largest logit: log-sum-exp minus mean logit would cancel in float32.
            shifted = z.sub_(top)
            e = torch.exp(shifted, out=exponentials[:number])
            total = e.sum(-1)
            log_total = total.log()
            entropy = log_total - torch.mul(e, shifted, out=products[:number]).sum(-1) / total
            logp = shifted.gather(1, self.targets[part, None]).squeeze(1) - log_total
            yield _Chunk(part, shifted, top, total, e, logp, entropy)

    def _raw(self, part: slice, out: Tensor) -> Tensor:
        """Raw logits of the rows ``part``, written to ``out``."""
        if self.widens:
            raw = wide_product(self.hidden[part], self.weight.T, out)
            return raw if self.bias is None else raw.add_(self.bias)
        if self.bias is None:
            return torch.mm(self.hidden[part], self.weight.T, out=out)
        return torch.addmm(self.bias, self.hidden[part], self.weight.T, out=out)

    def raw_gradient(self, chunk: _Chunk, g_logp: Tensor, g_entropy: Tensor | None) -> Tensor:
        """Gradient of the raw logits [m, V], from those of the chunk's log-probabilities and entropies [m].

        Takes the place of the chunk's exponentials.
        """
        factor = -(g_logp / chunk.total)[:, None]
        if g_entropy is not None:
            # -(g_logp + g_entropy (log p + H)) / total, in one buffer
            offset = (chunk.entropy - chunk.total.log())[:, None]
            factor = (chunk.shifted + offset).mul_(-(g_entropy / chunk.total)[:, None]).add_(factor)
        d = chunk.exponentials.mul_(factor)
        d.scatter_add_(1, self.targets[chunk.part, None], g_logp[:, None])
        return self.transform.through(d, chunk.shifted, chunk.top)


class _Gradients:
    """Accumulates the gradients of hidden, weight and bias over chunks; the weight's in float32 or better."""

    def __init__(self, head: _Head, needed: tuple[bool, bool, bool]) -> None:
        self.head = head
        wide = torch.float64 if head.weight.dtype == torch.float64 else torch.float32
        self.hidden = torch.zeros_like(head.hidden) if needed[0] else None
        # Written as a whole by the first chunk; only where there is none it must be cleared.
        self.weight = torch.empty_like(head.weight, dtype=wide) if needed[1] else None
        self.begun = len(head.targets) == 0
        if self.begun and self.weight is not None:
            self.weight.zero_()
        self.bias = torch.zeros_like(head.bias, dtype=wide) if needed[2] and head.bias is not None else None

    def add(self, part: slice, d: Tensor) -> None:
        narrow = d.to(self.head.weight.dtype)
        if self.hidden is not None:
            self.hidden[part] = narrow @ self.head.weight
        if self.weight is not None:
            if self.head.widens:
                add_wide_product(self.weight, narrow.T, self.head.hidden[part], keep=self.begun)
            elif self.weight.dtype == narrow.dtype:
                self.weight.addmm_(narrow.T, self.head.hidden[part], beta=int(self.begun))
            elif self.begun:
                self.weight += narrow.T @ self.head.hidden[part]
            else:
                self.weight.copy_(narrow.T @ self.head.hidden[part])
            self.begun = True
        if self.bias is not None:
            self.bias += d.sum(0)


def _prepare(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, transform: LogitTransform, chunk: int | None
) -> _Head:
    """Detach, and cast to autocast's dtype where autocast is on (inside a custom function it casts nothing itself)."""
    device = hidden.device.type
    autocast = torch.is_autocast_enabled(device) and weight.dtype != torch.float64
    dtype = torch.get_autocast_dtype(device) if autocast else weight.dtype
    cast_bias = None if bias is None else bias.detach().to(dtype)
    cast = weight.detach().to(dtype)
    chunk = chunk or CHUNK_ROWS.get(device, CHUNK_ROWS["cpu"])
    return _Head(hidden.detach().to(dtype), cast, cast_bias, targets, transform, chunk, widens(cast))


def _returned(grads: _Gradients, like: tuple[Any, ...], factor: Tensor | None = None) -> tuple[Tensor | None, ...]:
    """The three gradients in the dtypes of the arguments, times ``factor``; multiplied where they stand."""
    out: list[Tensor | None] = []
    for grad, dtype in zip((grads.hidden, grads.weight, grads.bias), like, strict=True):
        scaled = grad if grad is None or factor is None else grad.mul_(factor.to(grad.dtype))
        out.append(None if scaled is None else scaled.to(dtype))
    return tuple(out)


class _ChunkedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        transform: LogitTransform,
        chunk: int | None,
    ) -> tuple[Tensor, Tensor]:
        head = _prepare(hidden, weight, bias, targets, transform, chunk)
        wide = torch.float64 if head.weight.dtype == torch.float64 else torch.float32
        logp, entropy = (torch.empty(len(targets), dtype=wide, device=hidden.device) for _ in range(2))
        with torch.autocast(hidden.device.type, enabled=False):
            for part in head.chunks():
                logp[part.part], entropy[part.part] = part.logp, part.entropy
        ctx.head, ctx.like = head, (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.set_materialize_grads(False)
        return logp, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        g_logp, g_entropy = outputs
        head: _Head = ctx.head
        grads = _Gradients(head, ctx.needs_input_grad[:3])
        with torch.autocast(head.hidden.device.type, enabled=False):
            for part in head.chunks():
                logp_part = torch.zeros_like(part.logp) if g_logp is None else g_logp[part.part]
                entropy_part = None if g_entropy is None else g_entropy[part.part]
                grads.add(part.part, head.raw_gradient(part, logp_part, entropy_part))
        return *_returned(grads, ctx.like), None, None, None


class _SelectedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        transform: LogitTransform,
        chunk: int | None,
        token_loss: TokenLoss,
    ) -> Tensor:
        head = _prepare(hidden, weight, bias, targets, transform, chunk)
        grads = _Gradients(head, ctx.needs_input_grad[:3])
        wide = torch.float64 if head.weight.dtype == torch.float64 else torch.float32
        total = torch.zeros((), dtype=wide, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for part in head.chunks():
                loss, g_logp, g_entropy = _differentiate(token_loss, part)
                total += loss
                if any(ctx.needs_input_grad):
                    grads.add(part.part, head.raw_gradient(part, g_logp, g_entropy))
        ctx.grads, ctx.like = grads, (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        # On a CPU a glance at the factor is free, and it is nearly always 1.
        whole = outputs[0].device.type == "cpu" and float(outputs[0]) == 1.0
        returned = _returned(ctx.grads, ctx.like, None if whole else outputs[0])
        ctx.grads = None
        return *returned, None, None, None, None


def _differentiate(token_loss: TokenLoss, part: _Chunk) -> tuple[Tensor, Tensor, Tensor | None]:
    """The chunk's loss and its gradients with respect to log-probabilities and entropies (None: does not depend)."""
    with torch.enable_grad():
        logp, entropy = part.logp.detach().requires_grad_(), part.entropy.detach().requires_grad_()
        loss = token_loss(logp, entropy, part.part)
        if not loss.requires_grad:
            return loss, torch.zeros_like(part.logp), None
        g_logp, g_entropy = torch.autograd.grad(loss, (logp, entropy), allow_unused=True)
    return loss.detach(), torch.zeros_like(part.logp) if g_logp is None else g_logp, g_entropy


def chunked_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    transform: LogitTransform = LogitTransform(),
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of ``targets`` and entropies, both differentiable.

    Args:
        hidden: Final hidden states [M, D].
        weight: Head weight [V, D].
        targets: Token ids [M].
        bias: Head bias [V], if the model has one.
        transform: Scaling, soft-cap and temperature.
        chunk: Rows of logits held at a time; None: :data:`CHUNK_ROWS`.

    Returns:
        Log-probabilities [M] and entropies [M] in nats; float32, or float64 for a float64 head.
    """
    apply: Callable[..., tuple[Tensor, Tensor]] = _ChunkedLogprobs.apply
    return apply(hidden, weight, bias, targets, transform, chunk)


def selected_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_loss: TokenLoss,
    *,
    bias: Tensor | None = None,
    transform: LogitTransform = LogitTransform(),
    chunk: int | None = None,
) -> Tensor:
    """Sum of ``token_loss`` over the given rows; its gradient is taken chunk by chunk in the forward pass.

    Args:
        hidden: Final hidden states of the selected tokens only [M, D].
        weight: Head weight [V, D].
        targets: Token ids [M].
        token_loss: The token-separable loss; called once per chunk, in order.
        bias: Head bias [V], if the model has one.
        transform: Scaling, soft-cap and temperature.
        chunk: Rows of logits held at a time; None: :data:`CHUNK_ROWS`.

    Returns:
        A scalar that is connected to ``hidden`` and ``weight`` even for M = 0.
    """
    apply: Callable[..., Tensor] = _SelectedLoss.apply
    return apply(hidden, weight, bias, targets, transform, chunk, token_loss)
