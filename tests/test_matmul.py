"""Packed linear layers: the same products, only where they apply, and back to the ordinary ones where they fail."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from tiny_models import build
from torch import Tensor, nn
from torch.testing import assert_close

from lit_rlvr import matmul
from lit_rlvr.matmul import packed_linears

pytestmark = pytest.mark.skipif(not matmul._available(), reason="no x86 CPU with oneDNN")


@pytest.fixture(autouse=True)
def untried(monkeypatch: pytest.MonkeyPatch) -> None:
    """No shape has been through the self-test."""
    monkeypatch.setattr(matmul, "_passed", {})


def layers(**options: Any) -> nn.Sequential:
    """Two linear layers, without and with a bias."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 700, bias=False, **options), nn.ReLU(), nn.Linear(700, 33, **options))


@torch.no_grad()
@pytest.mark.parametrize("shape", [(1, 20), (32, 20), (3, 7, 20), (0, 20)])
def test_the_same_products(shape: tuple[int, ...]) -> None:
    """Any number of rows and dimensions."""
    model, x = layers(), torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    wanted = model(x)
    with packed_linears(model) as count:
        assert count == 2
        assert_close(model(x), wanted)
    assert torch.equal(model(x), wanted)
    assert all("forward" not in module.__dict__ for module in model.modules())


@torch.no_grad()
def test_new_weights_are_packed_anew() -> None:
    """Each time anew, and undone after an error too."""
    model, x = layers(), torch.randn(4, 20)
    with pytest.raises(KeyError), packed_linears(model):
        raise KeyError
    model[0].weight.mul_(-2)
    with packed_linears(model):
        got = model(x)
    assert_close(got, model(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_are_left_alone(dtype: torch.dtype) -> None:
    """Float32 alone is packed."""
    with packed_linears(layers(dtype=dtype)) as count:
        assert count == 0


def test_autocast_subclasses_and_other_devices_are_left_alone() -> None:
    """Whatever is more than a plain layer on this CPU."""

    class Louder(nn.Linear):
        """A layer that does more."""

    with torch.autocast("cpu", torch.bfloat16), packed_linears(layers()) as count:
        assert count == 0
    with packed_linears(nn.Sequential(Louder(3, 4), nn.Linear(3, 4, device="meta"))) as count:
        assert count == 0


def test_every_linear_layer_of_a_model_is_packed() -> None:
    """Seven per decoder layer, and the head."""
    with packed_linears(build("qwen3")) as count:
        assert count == 2 * 7 + 1


def rounded(dtype: torch.dtype) -> Any:
    """A product whose factors are rounded, as some kernels do."""

    def linear(weights: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
        return nn.functional.linear(x.to(dtype).float(), weights.to_dense().to(dtype).float(), bias)

    return linear


def misplaced(weights: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """A product with one wrong output in 700, which is not among those compared with float64."""
    out = nn.functional.linear(x, weights.to_dense(), bias).clone()
    out[..., 1] += 1.0
    return out


@torch.no_grad()
@pytest.mark.parametrize("product", [rounded(torch.bfloat16), rounded(torch.float16), misplaced])
def test_inaccurate_products_are_not_used(
    product: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """They fail the self-test, once and with a warning, and the ordinary product stays."""
    monkeypatch.setattr(matmul, "_linear", product)
    monkeypatch.setattr(matmul, "_pack", lambda weight: weight.detach())
    model, x = layers(), torch.randn(4, 20)
    wanted = model(x)
    for _ in range(2):
        with caplog.at_level(logging.WARNING), packed_linears(model) as count:
            assert count == 0
            assert torch.equal(model(x), wanted)
    assert [record.message.count("not accurate here") for record in caplog.records] == [1, 1]


def test_the_self_test_leaves_random_numbers_alone() -> None:
    """A run draws the same numbers with and without it."""
    model = layers()
    state = torch.get_rng_state()
    with packed_linears(model):
        pass
    assert torch.equal(torch.get_rng_state(), state)
