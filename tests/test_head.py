"""The chunked and the selected head against full float64 logits and autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from lit_rlvr.head import TokenLoss, chunked_logprobs, selected_loss
from lit_rlvr.logits import LogitTransform

ROWS, WIDTH, VOCABULARY = 7, 5, 13
PLAIN = LogitTransform()
TRANSFORMS = [
    PLAIN,
    LogitTransform(temperature=0.7),
    LogitTransform(scale=0.25),
    LogitTransform(softcap=2.0),
    LogitTransform(scale=1.5, softcap=3.0, temperature=1.3),
]
CHUNKS = [1, 3, ROWS, 100]
U = 2.0**-8
"""Unit roundoff of bfloat16: 8 significant bits."""


class Inputs:
    """Random hidden states, weight, bias and targets, and three coefficients per row."""

    def __init__(self, dtype: torch.dtype = torch.float64, rows: int = ROWS, bias: bool = True) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.hidden = normal(rows, WIDTH).to(dtype).requires_grad_()
        self.weight = normal(VOCABULARY, WIDTH).to(dtype).requires_grad_()
        self.bias = normal(VOCABULARY).to(dtype).requires_grad_() if bias else None
        self.targets = torch.randint(VOCABULARY, (rows,), generator=generator)
        self.a, self.b, self.old = normal(3, rows)

    @property
    def leaves(self) -> list[Tensor]:
        """What gradients are taken of."""
        return [self.hidden, self.weight] if self.bias is None else [self.hidden, self.weight, self.bias]

    def loss(self, logprobs: Tensor, entropies: Tensor, part: slice) -> Tensor:
        """A token loss that is linear in neither argument."""
        a, b, old = (t[part].to(logprobs.dtype) for t in (self.a, self.b, self.old))
        return torch.sum(a * (logprobs - old).exp() + b * logprobs * entropies + entropies**2)

    def full(self, transform: LogitTransform) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies from all logits at once, in float64, written out."""
        z = self.hidden.double() @ self.weight.double().T
        z = (z if self.bias is None else z + self.bias.double()) * transform.scale
        if transform.softcap is not None:
            z = transform.softcap * torch.tanh(z / transform.softcap)
        logp = torch.log_softmax(z / transform.temperature, -1)
        return logp[torch.arange(len(logp)), self.targets], -(logp.exp() * logp).sum(-1)

    def chunked(self, transform: LogitTransform = PLAIN, chunk: int = 3) -> tuple[Tensor, Tensor]:
        """The function under test."""
        return chunked_logprobs(
            self.hidden, self.weight, self.targets, bias=self.bias, transform=transform, chunk=chunk
        )

    def selected(self, loss: TokenLoss, transform: LogitTransform = PLAIN, chunk: int = 3) -> Tensor:
        """The function under test."""
        return selected_loss(
            self.hidden, self.weight, self.targets, loss, bias=self.bias, transform=transform, chunk=chunk
        )


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("bias", [True, False])
def test_both_roads_equal_full_logits(transform: LogitTransform, chunk: int, bias: bool) -> None:
    """Values, and gradients of hidden states, weight and bias, in float64."""
    data = Inputs(bias=bias)
    everything = slice(0, ROWS)
    wanted = data.full(transform)
    loss = data.loss(*wanted, everything)
    gradients = torch.autograd.grad(3 * loss, data.leaves)

    got = data.chunked(transform, chunk)
    assert_close(got, wanted)
    assert_close(torch.autograd.grad(3 * data.loss(*got, everything), data.leaves), gradients)
    selected = data.selected(data.loss, transform, chunk)
    assert_close(selected, loss)
    assert_close(torch.autograd.grad(3 * selected, data.leaves), gradients)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_float32_equals_float64(transform: LogitTransform) -> None:
    """Both roads in the precision that is trained in."""
    data = Inputs(torch.float32)
    loss = data.loss(*data.full(transform), slice(0, ROWS))
    gradients = [g.float() for g in torch.autograd.grad(loss, data.leaves)]
    selected = data.selected(data.loss, transform)
    assert_close(selected, loss.float())
    assert_close(list(torch.autograd.grad(selected, data.leaves)), gradients)
    got = data.chunked(transform)
    assert_close(got, tuple(t.float() for t in data.full(transform)))
    assert_close(list(torch.autograd.grad(data.loss(*got, slice(0, ROWS)), data.leaves)), gradients)


@pytest.mark.parametrize("peak", [0.0, 20.0])
@pytest.mark.parametrize("offset", [0.0, -20.0, 20.0])
def test_float32_entropy_of_a_large_vocabulary(offset: float, peak: float) -> None:
    """40,000 logits, flat or with one likely token, wherever their zero lies; in float32.

    A running float32 sum loses the tail's terms, and log-sum-exp minus mean logit cancels: 1e-2 nats off.
    """
    z = 2 * torch.randn(3, 40_000, generator=torch.Generator().manual_seed(0)) + offset
    z[:, 0] += peak
    logp = z.double().log_softmax(-1)
    wanted = -(logp.exp() * logp).sum(-1)
    _, entropies = chunked_logprobs(torch.eye(3), z.T.contiguous(), torch.zeros(3, dtype=torch.int64))
    assert_close(entropies, wanted.float())


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("which", [0, 1])
def test_gradcheck_of_each_output(transform: LogitTransform, which: int) -> None:
    """Finite differences of log-probabilities (0) and entropies (1), each without the other."""
    data = Inputs()

    def output(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return chunked_logprobs(hidden, weight, data.targets, bias=bias, transform=transform, chunk=3)[which]

    assert torch.autograd.gradcheck(output, tuple(data.leaves))


def test_losses_of_one_argument_or_none() -> None:
    """A token loss may use only log-probabilities, only entropies, or be a constant."""
    data = Inputs()
    logp, entropy = data.full(PLAIN)
    pairs: list[tuple[TokenLoss, Tensor]] = [
        (lambda logprobs, entropies, part: logprobs.sum(), logp.sum()),
        (lambda logprobs, entropies, part: entropies.sum(), entropy.sum()),
        (lambda logprobs, entropies, part: torch.tensor(2.0 * len(logprobs)), 14.0 + 0 * logp.sum()),
    ]
    for loss, wanted in pairs:
        got = data.selected(loss)
        assert_close(got, wanted)
        assert_close(torch.autograd.grad(got, data.leaves), torch.autograd.grad(wanted, data.leaves, retain_graph=True))


def test_token_loss_is_called_once_per_chunk_in_order() -> None:
    """Slices cover the rows without overlap; none is called for no rows."""
    parts: list[slice] = []

    def loss(logprobs: Tensor, entropies: Tensor, part: slice) -> Tensor:
        parts.append(part)
        assert len(logprobs) == len(entropies) == part.stop - part.start
        return logprobs.sum()

    Inputs().selected(loss, chunk=3)
    assert parts == [slice(0, 3), slice(3, 6), slice(6, 7)]
    Inputs(rows=0).selected(loss)
    assert len(parts) == 3


def test_no_rows_give_a_connected_zero() -> None:
    """A rank without tokens still takes part in the backward pass, with zero gradients."""
    data = Inputs(rows=0)
    for total in (data.selected(data.loss), sum(t.sum() for t in data.chunked())):
        assert isinstance(total, Tensor)
        assert float(total.detach()) == 0.0
        for gradient, leaf in zip(torch.autograd.grad(total, data.leaves), data.leaves, strict=True):
            assert torch.equal(gradient, torch.zeros_like(leaf))


@pytest.mark.parametrize("frozen", [["weight"], ["hidden"], ["bias"], ["weight", "bias"]])
def test_frozen_tensors_get_no_gradient(frozen: list[str]) -> None:
    """The others' gradients stay what they were."""
    data = Inputs()
    gradients = torch.autograd.grad(data.loss(*data.full(PLAIN), slice(0, ROWS)), data.leaves)
    wanted = dict(zip(("hidden", "weight", "bias"), gradients, strict=True))
    for road in ("chunked", "selected"):
        data = Inputs()
        for name in frozen:
            getattr(data, name).requires_grad_(False)
        loss = data.selected(data.loss) if road == "selected" else data.loss(*data.chunked(), slice(0, ROWS))
        loss.backward()
        for name, gradient in wanted.items():
            if name in frozen:
                assert getattr(data, name).grad is None
            else:
                assert_close(getattr(data, name).grad, gradient)


def test_nothing_frozen_is_nothing_to_differentiate() -> None:
    """Scoring under no_grad gives the same numbers, detached."""
    data = Inputs()
    with torch.no_grad():
        scored, loss = data.chunked(), data.selected(data.loss)
    assert [scored[0].requires_grad, loss.requires_grad] == [False, False]
    assert_close((*scored, loss), (*data.full(PLAIN), data.loss(*data.full(PLAIN), slice(0, 7))))


def bfloat16_reference(data: Inputs, chunk: int) -> tuple[Tensor, Tensor]:
    """Loss, and the gradient d of the raw logits in float64, from the same rounded logits."""
    hidden, weight = data.hidden.detach().bfloat16(), data.weight.detach().bfloat16()
    raw = torch.cat([linear(part, weight) for part in torch.split(hidden, chunk)]).double().requires_grad_()
    logp = raw.log_softmax(-1)
    picked, entropy = logp[torch.arange(len(logp)), data.targets], -(logp.exp() * logp).sum(-1)
    loss = data.loss(picked, entropy, slice(0, len(logp)))
    return loss.detach(), torch.autograd.grad(loss, raw)[0]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("road", ["chunked", "selected"])
def test_bfloat16_rounds_only_where_it_must(road: str, autocast: bool) -> None:
    """Softmax, losses and the sum over chunks are float32; only what enters and leaves a matrix product is rounded.

    d is rounded once (U |d|) and each product's result once more (U |d| |.|): 2 U |d|'|.| per element, and a third
    U where the result is returned in bfloat16. float32 rounding is far below.
    """
    data = Inputs(torch.float32 if autocast else torch.bfloat16, rows=24, bias=False)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got = data.selected(data.loss) if road == "selected" else data.loss(*data.chunked(), slice(0, 24))
    loss, d = bfloat16_reference(data, 3)
    assert_close(got, loss.float())
    hidden, weight = data.hidden.detach().bfloat16().double(), data.weight.detach().bfloat16().double()
    got_hidden, got_weight = torch.autograd.grad(got, data.leaves)
    assert got_hidden.dtype == got_weight.dtype == data.weight.dtype
    assert bool(((got_weight.double() - d.T @ hidden).abs() <= 3.01 * U * d.abs().T @ hidden.abs()).all())
    assert bool(((got_hidden.double() - d @ weight).abs() <= 3.01 * U * d.abs() @ weight.abs()).all())


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("road", ["chunked", "selected"])
def test_weight_and_bias_gradients_add_up_in_float32(road: str, autocast: bool) -> None:
    """1,024 equal chunks give 1,024 times the gradient of one; a bfloat16 sum would stop growing near 256 times.

    Adding n equal float32 numbers one by one errs by at most n 2^-24 = 6e-5 of the sum, and bfloat16 weights round
    both results once more, by U each.
    """
    n = 1024
    data = Inputs(torch.float32 if autocast else torch.bfloat16, rows=1)

    def gradients(copies: int) -> list[Tensor]:
        hidden, targets = data.hidden.expand(copies, -1), data.targets.expand(copies)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            if road == "selected":
                loss = selected_loss(hidden, data.weight, targets, lambda z, h, part: z.sum(), bias=data.bias, chunk=1)
            else:
                loss = chunked_logprobs(hidden, data.weight, targets, bias=data.bias, chunk=1)[0].sum()
        return [g.double() for g in torch.autograd.grad(loss, data.leaves[1:])]

    wanted = [n * g for g in gradients(1)]
    assert_close(gradients(n), wanted, rtol=n * 2.0**-24 + (0 if autocast else 2 * U), atol=0)


def test_backward_inside_autocast_changes_nothing() -> None:
    """Micro-batches call backward inside the precision's context: their gradients equal those from outside of it."""
    gradients = []
    for inside in (False, True):
        data = Inputs(torch.float32, rows=24)
        with torch.autocast("cpu", torch.bfloat16):
            loss = data.loss(*data.chunked(), slice(0, 24))
            if inside:
                gradients.append(torch.autograd.grad(loss, data.leaves))
        if not inside:
            gradients.append(torch.autograd.grad(loss, data.leaves))
    assert_close(gradients[1], gradients[0])


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any operation gave back."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


@pytest.mark.parametrize("road", ["chunked", "selected"])
def test_full_logits_never_exist(road: str) -> None:
    """The largest tensor of forward and backward is one chunk of logits, for any number of tokens."""
    data, chunk = Inputs(rows=60), 6
    with LargestTensor() as spy:
        loss = (
            data.selected(data.loss, chunk=chunk) if road == "selected" else torch.cat(data.chunked(chunk=chunk)).sum()
        )
        forward = spy.largest
        torch.autograd.grad(loss, data.leaves)
    # Hidden states and their gradient hold 300 elements, a chunk of logits 78; all logits would be 780.
    assert 6 * VOCABULARY <= forward <= 60 * WIDTH
    assert 6 * VOCABULARY <= spy.largest <= 60 * WIDTH


@pytest.mark.parametrize("rows", [0, 5])
def test_memory_that_was_never_written_is_never_read(rows: int) -> None:
    """In torch's deterministic mode such memory holds NaN."""
    hidden, weight = torch.ones(rows, 3, requires_grad=True), torch.ones(4, 3, requires_grad=True)
    torch.use_deterministic_algorithms(True)
    try:
        targets = torch.zeros(rows, dtype=torch.int64)
        selected_loss(hidden, weight, targets, lambda logprobs, entropies, part: logprobs.sum(), chunk=2).backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert weight.grad is not None
    # Every logit is equal: the target's gains 3/4 of each hidden state, the others lose 1/4.
    torch.testing.assert_close(weight.grad, rows * torch.tensor([0.75, -0.25, -0.25, -0.25])[:, None].expand(4, 3))
