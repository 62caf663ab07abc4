"""The recorder of other tests refuses and reveals what CUDA graphs would not do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tape import CaptureError, TapeRecorder
from torch import Tensor


def record(run: Callable[[], Any]) -> Callable[[], None]:
    return TapeRecorder().record(run)


@pytest.mark.parametrize(
    "run",
    [
        lambda x, out: out.fill_(x.sum().item()),
        lambda x, out: out.fill_(1) if x.sum() > 0 else None,
        lambda x, out: out.copy_(x[x > 0].sum()),
        lambda x, out: out.copy_(x.nonzero().sum()),
        lambda x, out: out.copy_(torch.tensor(2.0)),
        lambda x, out: out.copy_(torch.unique(x).sum()),
    ],
)
def test_refuses(run: Callable[[Tensor, Tensor], Any]) -> None:
    with pytest.raises(CaptureError):
        record(lambda: run(torch.ones(3), torch.zeros(())))


def test_reads_memory_and_not_numbers() -> None:
    x, out, number = torch.ones(3), torch.zeros(3), 1
    replay = record(lambda: out.copy_(torch.cat([x[:1] * 2, x[1:]]) + number))
    x[:], number = 5, 100
    replay()
    assert out.tolist() == [11, 6, 6]


def test_does_not_see_what_takes_a_tensors_place() -> None:
    holder, out = {"x": torch.ones(2)}, torch.zeros(2)
    replay = record(lambda: out.copy_(holder["x"] * 2))
    holder["x"] = torch.full((2,), 7.0)
    replay()
    assert out.tolist() == [2, 2]


def test_what_lies_between_is_gone() -> None:
    kept: list[Tensor] = []
    x = torch.ones(2)
    record(lambda: kept.append(x + 1))()
    assert kept[-1].isnan().all()
