"""Products of narrow matrices in float32: a stand-in for what GPUs do, and the meta device for what torch accepts."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from test_head import Inputs, U
from torch import Tensor
from torch.testing import assert_close

from lit_rlvr import head, products
from lit_rlvr.head import chunked_logprobs, selected_loss
from lit_rlvr.logits import LogitTransform

CPU = torch.device("cpu")
PLAIN = LogitTransform()


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU adds products of bfloat16 numbers up in float32, as a GPU does, and may be asked for them."""
    mm, addmm = torch.mm, torch.addmm

    def wide_mm(a: Tensor, b: Tensor, *, out_dtype: Any = None, out: Any = None) -> Tensor:
        if out_dtype is None:
            return mm(a, b, out=out)
        return mm(a.to(out_dtype), b.to(out_dtype), out=out)

    def wide_addmm(total: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, out_dtype: Any = None, out: Any) -> Tensor:
        return addmm(total, a.to(out_dtype), b.to(out_dtype), beta=beta, out=out)

    monkeypatch.setattr(torch, "mm", wide_mm)
    monkeypatch.setattr(torch, "addmm", wide_addmm)
    for module in (head, products):
        monkeypatch.setattr(module, "widens", lambda like: like.dtype == torch.bfloat16)


@pytest.fixture(autouse=True)
def _afresh() -> None:
    products._passes.cache_clear()


def test_a_device_is_asked_once(wide: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    assert products._passes(CPU, torch.bfloat16)
    monkeypatch.setattr(torch, "mm", lambda a, b, out_dtype: (a @ b).float())
    assert products._passes(CPU, torch.bfloat16)
    with caplog.at_level(logging.WARNING):
        assert not products._passes(CPU, torch.float16)
    assert "logits are rounded to torch.float16 here: wide products are not right" in caplog.text


def test_a_device_that_cannot_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    """This CPU has no such product, and is never asked."""
    assert not products._passes(CPU, torch.bfloat16)
    assert "logits are rounded to torch.bfloat16 here: Could not run" in caplog.text
    assert not products.widens(torch.zeros(1, dtype=torch.bfloat16))


@pytest.mark.parametrize("transform", [PLAIN, LogitTransform(scale=1.5, softcap=3.0, temperature=1.3)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.usefixtures("wide")
def test_log_probabilities_are_those_of_float32(bias: bool, transform: LogitTransform) -> None:
    """bfloat16 states and weights, and not one rounding to bfloat16 after them; in their gradients there is one."""
    given = Inputs(torch.bfloat16, bias=bias)
    options: dict[str, Any] = {"bias": given.bias, "transform": transform, "chunk": 3}
    expected = given.full(transform)
    both = chunked_logprobs(given.hidden, given.weight, given.targets, **options)
    for found, exact in zip(both, expected, strict=True):
        assert found.dtype == torch.float32
        assert_close(found, exact.float())
    loss = selected_loss(given.hidden, given.weight, given.targets, given.loss, **options)
    exact_loss = given.loss(*expected, slice(None))
    assert_close(loss, exact_loss.float())
    ours, exact = torch.autograd.grad(loss, given.leaves), torch.autograd.grad(exact_loss, given.leaves)
    for mine, theirs in zip(ours, exact, strict=True):
        # The gradient of the logits is rounded, and the result: U of each term, and of the sum.
        assert_close(mine.float(), theirs.float(), rtol=2 * U, atol=4 * U * float(theirs.abs().max()))


def test_torch_takes_these_arguments() -> None:
    """On the meta device, which knows what each operator accepts."""
    a, b = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in ((3, 4), (4, 5)))
    total = products.wide_product(a, b)
    assert (total.shape, total.dtype) == ((3, 5), torch.float32)
    assert products.wide_product(a, b, total) is total
    products.add_wide_product(total, a, b, keep=True)


def test_a_whole_head_on_the_meta_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "widens", lambda like: True)
    monkeypatch.setattr(torch, "autocast", lambda kind, **options: nullcontext())  # it does not know of the device
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)
    hidden, weight = (torch.empty(7, 4, dtype=torch.bfloat16, device="meta", requires_grad=True) for _ in range(2))
    targets = torch.empty(7, dtype=torch.int64, device="meta")
    loss = selected_loss(hidden, weight, targets, lambda logp, entropy, part: logp.sum(), chunk=3)
    gradients = torch.autograd.grad(loss, [hidden, weight])
    assert [g.dtype for g in gradients] == [torch.bfloat16] * 2


@pytest.mark.usefixtures("wide")
def test_an_engine_draws_from_the_same_logits() -> None:
    linear = torch.nn.Linear(8, 30, dtype=torch.bfloat16)
    hidden = torch.randn(4, 8).bfloat16()
    logits = products.head_logits(linear, hidden)
    assert_close(logits, torch.nn.functional.linear(hidden.float(), linear.weight.float(), linear.bias.float()))
    with torch.autocast("cpu", torch.bfloat16):
        assert products.head_logits(linear, hidden).dtype == torch.bfloat16
