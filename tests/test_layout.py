"""How rows are laid out for the policy changes neither loss nor gradients: against every whole row on its own."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rollouts import padded
from tiny_models import VOCABULARY, build
from torch import Tensor
from torch.nn.functional import rms_norm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from lit_rlvr.layout import Layout, check_packs, choose_layout
from lit_rlvr.microbatch import MicroBatch, cut
from lit_rlvr.policy import Policy
from lit_rlvr.reduce import LocalReduce
from lit_rlvr.types import RolloutBatch

LAYOUTS: tuple[Layout, ...] = ("padded", "packed", "shared")
CPU = torch.device("cpu")
few = settings(max_examples=25, deadline=None, derandomize=True)


def ragged(sizes: list[int], seed: int, longest: int = 9) -> RolloutBatch:
    """Groups of ``sizes`` responses of 1 to ``longest`` tokens to prompts of 1 to 6, in a random order of rows."""
    rng = random.Random(seed)

    def words(most: int) -> list[float]:
        return [float(rng.randrange(VOCABULARY)) for _ in range(rng.randint(1, most))]

    prompts = [words(6) for _ in sizes]
    group = [draw for draw, size in enumerate(sizes) for _ in range(size)]
    rng.shuffle(group)
    asked, answers = [prompts[g] for g in group], [words(longest) for _ in group]
    prompt_ids, response_ids = padded(asked).long(), padded(answers).long()
    rows, length = response_ids.shape
    masks = [
        torch.arange(ids.shape[1])[None] < torch.tensor([len(row) for row in of])[:, None]
        for ids, of in ((prompt_ids, asked), (response_ids, answers))
    ]
    zeros = torch.zeros(rows, length)
    return RolloutBatch(
        prompt_ids, masks[0], response_ids, masks[1], zeros, zeros, zeros[:, 0], zeros[:, 0], torch.tensor(group),
        torch.zeros(rows, 3, dtype=torch.int64), masks[1][:, 0],
    )  # fmt: skip


def choose(rollout: RolloutBatch, share: float, seed: int) -> Tensor:
    """A random share of the response tokens."""
    generator = torch.Generator().manual_seed(seed)
    return rollout.response_mask & (torch.rand(rollout.response_mask.shape, generator=generator) < share)


def weights(rollout: RolloutBatch) -> Tensor:
    """A number for every token, of both signs."""
    return torch.sin(torch.arange(rollout.response_mask.numel(), dtype=torch.float64)).view_as(rollout.response_mask)


def plain(policy: Policy, rollout: RolloutBatch, chosen: Tensor) -> Tensor:
    """The weighted sum of the chosen tokens' log-probabilities, each row whole and alone, by the model's own logits."""
    total = torch.zeros((), dtype=torch.float64)
    for row in range(len(rollout)):
        prompt = rollout.prompt_ids[row][rollout.prompt_mask[row]]
        response = rollout.response_ids[row][rollout.response_mask[row]]
        logits = policy.hf(input_ids=torch.cat([prompt, response])[None], use_cache=False).logits[0]
        logp = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, response[:, None]).squeeze(1)
        picked = chosen[row, : len(response)]
        total = total + (logp * weights(rollout)[row, : len(response)])[picked].sum()
    return total


def laid_out(policy: Policy, rollout: RolloutBatch, micros: list[tuple[MicroBatch, bool]], selected: bool) -> Tensor:
    """The same of micro-batches, with the selected or with the chunked head."""
    total = torch.zeros((), dtype=torch.float64)
    for micro, _ in micros:
        weight = weights(rollout)[micro.row, micro.column]

        def loss(logprobs: Tensor, entropies: Tensor, part: slice, weight: Tensor = weight) -> Tensor:
            return (logprobs * weight[part]).sum()

        if selected:
            total = total + policy(micro.ids, micro.index, micro.targets, 1.0, loss, micro.pack)
        else:
            logprobs, _ = policy(micro.ids, micro.index, micro.targets, pack=micro.pack)
            total = total + (logprobs * weight).sum()
    return total


def gradients(policy: Policy, loss: Tensor) -> list[Tensor]:
    """Of all parameters."""
    return [g.clone() for g in torch.autograd.grad(loss, list(policy.parameters()))]


def check(policy: Policy, rollout: RolloutBatch, chosen: Tensor, layout: Layout, **options: Any) -> None:
    """Loss and the gradients of all parameters are those of whole rows."""
    selected, exact = options.pop("selected", True), options.pop("exact", True)
    wanted = plain(policy, rollout, chosen)
    cutting = {"budget": 10**6, "size": None, **options}
    micros = cut(rollout, chosen, **cutting, device=CPU, reduce=LocalReduce(), layout=layout)
    loss = laid_out(policy, rollout, micros, selected)
    # The norms of some families compute in float32 whatever the weights, and a prompt's gradients meet before them.
    tolerance = {} if exact else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(loss, wanted, **tolerance)
    if chosen.any():
        torch.testing.assert_close(gradients(policy, loss), gradients(policy, wanted), **tolerance)


def float64(family: str, **overrides: Any) -> Policy:
    """A tiny policy that computes packs; the norms of qwen3 and llama are in float64 too."""
    hf = build(family, **overrides).double()
    for norm in hf.modules():
        if isinstance(norm, (Qwen3RMSNorm, LlamaRMSNorm)):
            norm.forward = partial(rms_norm, normalized_shape=norm.weight.shape, weight=norm.weight, eps=1e-6)
    policy = Policy(hf)
    policy.layout = choose_layout(hf, None)
    assert policy.layout == "shared"
    check_packs(hf)
    return policy


@pytest.fixture(scope="module")
def qwen3() -> Policy:
    """Grouped queries and a tied head."""
    return float64("qwen3")


@few
@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.floats(0.1, 1), st.integers(1, 60), st.integers(0, 999))
def test_equal_to_whole_rows(qwen3: Policy, sizes: list[int], share: float, budget: int, seed: int) -> None:
    """Ragged groups, split over micro-batches, any tokens: for every layout, with rows and tokens left out."""
    rollout = ragged(sizes, seed)
    chosen = choose(rollout, share, seed)
    for layout in LAYOUTS:
        check(qwen3, rollout, chosen, layout, selected=seed % 2 == 0, budget=budget)
        check(qwen3, rollout, chosen, layout, selected=seed % 2 == 0, size=1 + seed % 3)


@pytest.mark.parametrize("layout", ["packed", "shared"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "granite"])
def test_families(family: str, layout: Layout) -> None:
    """Untied heads, learnt positions, windows of 4 tokens in every other layer, scaled logits."""
    rollout = ragged([3, 1, 4], 5)
    check(float64(family), rollout, choose(rollout, 0.5, 5), layout, exact=family in ("llama", "gpt2"))
