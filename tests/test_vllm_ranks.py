"""Two processes with two vLLM servers push the weights that one process pushes, also when they are sharded."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from fake_vllm import FakeVLLM, serving
from test_ddp import torchrun
from torch import Tensor
from vllm_ranks_run import train_on


class Remembers(FakeVLLM):
    """Keeps the weights of every push, and for every request how many there had been."""

    def __init__(self) -> None:
        super().__init__(22, 64, dtype="torch.float64")
        self.pushes: list[dict[str, Tensor]] = []
        self.used: list[int] = []

    def lit_rlvr_finish(self) -> dict[str, Any]:
        answer = super().lit_rlvr_finish()
        self.pushes.append(self.weights)
        return answer

    def on_inference_v1_generate(self, query: Any, body: Any) -> tuple[int, Any]:
        self.used.append(len(self.pushes))
        return super().on_inference_v1_generate(query, body)


def pushes(servers: int, run: Any) -> list[Remembers]:
    """Servers that a run has used."""
    with ExitStack() as stack:
        fakes = [Remembers() for _ in range(servers)]
        run([stack.enter_context(serving(fake)) for fake in fakes])
    return fakes


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("strategy", "how"), [("ddp", "in turn"), ("fsdp", "in turn"), ("ddp", "overlap"), ("fsdp", "lora")]
)
def test_two_processes_push_what_one_does(strategy: str, how: str) -> None:
    """In every phase, to both servers; each process samples from its own, also while it learns."""
    if how == "lora":
        pytest.importorskip("peft", reason="the extra lit-rlvr[lora] is not installed")
    (one,) = pushes(1, lambda addresses: train_on("auto", 1, addresses, how))
    two = pushes(2, lambda addresses: torchrun("vllm_ranks_run.py", strategy, how, *addresses))
    assert len(one.pushes) == 3
    assert not torch.equal(*(push["model.layers.0.self_attn.q_proj.weight"] for push in one.pushes[1:]))
    for fake in two:
        assert fake.called("/inference/v1/generate") == one.called("/inference/v1/generate") / 2
        assert fake.used[::2] == one.used[::4] == ([1, 1, 2] if how == "overlap" else [1, 2, 3])
        # float64 throughout, but sums over rows are taken in another order and facts are kept in float32.
        torch.testing.assert_close(fake.pushes, one.pushes, rtol=1e-5, atol=1e-7)
