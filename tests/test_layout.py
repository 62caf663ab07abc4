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
from tiny_models import ROPE, VOCABULARY, build
from torch import Tensor
from torch.nn.functional import rms_norm
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from lit_rlvr.layout import KNOWN, Layout, Reader, check_packs, choose_layout
from lit_rlvr.microbatch import MicroBatch, cut
from lit_rlvr.policy import Policy, recompute_activations
from lit_rlvr.reduce import LocalReduce
from lit_rlvr.scoring import score
from lit_rlvr.segments import hidden_states
from lit_rlvr.split import CHEAP, split_prompts
from lit_rlvr.types import RolloutBatch

LAYOUTS: tuple[Layout, ...] = ("padded", "packed", "shared")
TESTED_FAMILIES = ("llama", "gpt2", "gemma3", "granite")
KINDS = ("gemma", "mistral", "phi3", "qwen2", "smollm3")
CPU = torch.device("cpu")
few = settings(max_examples=15, deadline=None, derandomize=True)


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
    reader = Reader(CPU, layout, options.pop("masks", True))
    cutting = {"budget": 10**6, "size": None, **options}
    micros = list(cut(rollout, chosen, **cutting, reader=reader, reduce=LocalReduce()))
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
@pytest.mark.parametrize("family", TESTED_FAMILIES)
def test_families(family: str, layout: Layout) -> None:
    """Untied heads, learnt positions, windows of 4 tokens in every other layer, scaled logits."""
    rollout = ragged([3, 1, 4], 5)
    check(float64(family), rollout, choose(rollout, 0.5, 5), layout, exact=family in ("llama", "gpt2"))


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize("largest", [0, 30, 10**6])
def test_long_responses_share_no_prompt_by_a_mask(
    qwen3: Policy, monkeypatch: pytest.MonkeyPatch, largest: int, masks: bool
) -> None:
    """What they and the others learn is the same; where it takes no mask, all share."""
    monkeypatch.setattr("lit_rlvr.microbatch.MOST_MASKED", largest)
    rollout = ragged([3, 1, 4], 5)
    chosen = choose(rollout, 0.5, 5)
    check(qwen3, rollout, chosen, "shared", budget=20, masks=masks)
    parts = [
        part
        for micro, _ in cut(rollout, chosen, 10**6, None, Reader(CPU, "shared", masks), LocalReduce())
        if micro.pack is not None
        for part in micro.pack.parts
        if part.prompts is not None
    ]
    most = max((part.lengths[0] * (part.prompts[2] + part.lengths[0]) for part in parts if part.prompts), default=0)
    assert most <= largest or not masks
    assert (most > 30) == (largest > 30 or not masks)
    assert bool(parts) == (largest > 0 or not masks)


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_that_share_unless_told_otherwise(kind: str) -> None:
    """The rest of those that KNOWN names; Mistral with a window, SmolLM3 without positions in every other layer."""
    more: dict[str, Any] = {"mistral": {"sliding_window": 4}, "smollm3": {"no_rope_layer_interval": 2}}.get(kind, {})
    hf = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **ROPE, **more)).double()
    policy = Policy(hf)
    policy.layout = choose_layout(hf, None)
    assert policy.layout == "shared"
    check_packs(hf)
    rollout = ragged([3, 1, 4], 5)
    for layout in LAYOUTS:
        check(policy, rollout, choose(rollout, 0.5, 5), layout, exact=False)


def test_every_known_kind_is_tested() -> None:
    """Here by name, or among the families above."""
    assert set(KNOWN) == {*KINDS, *(build(family).config.model_type for family in ("qwen3", *TESTED_FAMILIES))}


def test_gradient_checkpointing(qwen3: Policy) -> None:
    """Layers that are computed again in the backward pass are given the pack again."""
    rollout = ragged([3, 1, 4], 5)
    recompute_activations(qwen3.hf)
    qwen3.train()
    try:
        check(qwen3, rollout, choose(rollout, 0.5, 5), "shared")
    finally:
        qwen3.eval()
        disable: Any = getattr(qwen3.hf, "activation_checkpointing_disable", None)  # its name since transformers 5.20
        (disable or qwen3.hf.gradient_checkpointing_disable)()


def test_padded_rows_of_a_model_that_computes_packs(qwen3: Policy) -> None:
    """What a model computes without a pack is what it computed before, left padding and a cache included."""
    before, ids = build("qwen3").double(), torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]])
    mask = ids > 0
    for hf in (before, qwen3.hf):
        for norm in hf.modules():
            if isinstance(norm, Qwen3RMSNorm):
                norm.forward = partial(rms_norm, normalized_shape=norm.weight.shape, weight=norm.weight, eps=1e-6)
    options = {"attention_mask": mask.long(), "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    torch.testing.assert_close(qwen3.hf(ids, **options).logits[mask], before(ids, **options).logits[mask])
    generation = {"max_new_tokens": 5, "do_sample": False, "attention_mask": mask.long(), "pad_token_id": 0}
    assert torch.equal(qwen3.hf.generate(ids, **generation), before.generate(ids, **generation))


def test_scores_do_not_depend_on_the_layout(qwen3: Policy) -> None:
    """Log-probabilities and entropies of every response token."""
    rollout = ragged([3, 1, 4], 6)
    scores = []
    for layout in LAYOUTS:
        qwen3.layout = layout
        scores.append(score(qwen3, rollout, 0.8, 30))
    for other in scores[1:]:
        torch.testing.assert_close(other, scores[0])


class Largest(TorchDispatchMode):
    """Remembers the most elements of a tensor."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.elements = max(self.elements, out.numel())
        return out


@pytest.mark.parametrize("layout", ["packed", "shared"])
def test_no_tensor_grows_with_the_square_of_a_pack(qwen3: Policy, layout: Layout) -> None:
    """In a pack of hundreds of short rows the largest tensor is one of the network's own."""
    rollout = ragged([8] * 40, 7)
    [(micro, _)] = cut(rollout, rollout.response_mask, 10**6, None, Reader(CPU, layout), LocalReduce())
    with Largest() as largest:
        hidden_states(qwen3.hf.base_model, micro.ids, micro.pack)
    places = micro.ids.numel()
    assert places > 1000
    assert largest.elements <= 64 * places < places**2


def test_a_prompt_is_there_once() -> None:
    """Two prompts of 2 tokens with 2 and 1 responses of 3, of which the last needs no place."""
    ids = torch.tensor([[2, 3], [4, 5], [2, 3]])
    everything, answers = torch.ones(3, 3, dtype=torch.bool), torch.arange(10, 19).view(3, 3)
    zeros, flags = torch.zeros(3, 3), torch.ones(3, dtype=torch.bool)
    rollout = RolloutBatch(
        ids, everything[:, :2], answers, everything, zeros, zeros, zeros[0], zeros[0], torch.arange(3),
        torch.zeros(3, 3, dtype=torch.int64), flags,
    )  # fmt: skip
    [(micro, _)] = cut(rollout, everything, 99, None, Reader(CPU, "shared"), LocalReduce())
    assert micro.pack is not None
    assert micro.ids.tolist() == [[4, 5, 13, 14, 2, 3, 10, 11, 16, 17]]
    assert micro.pack.positions.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3, 2, 3]]
    assert micro.index.tolist() == [5, 6, 7, 1, 2, 3, 5, 8, 9]
    assert micro.targets.tolist() == list(range(10, 19))
    assert [(p.start, p.lengths, p.prompts) for p in micro.pack.parts] == [(0, (4, 2), None), (6, (2, 2), (4, 1, 2))]


@pytest.mark.parametrize("family", ["gemma2"])
def test_models_that_do_not_allow_packs(family: str) -> None:
    """Asked for, it is refused in a sentence; left open, rows are padded."""
    assert choose_layout(build(family), None) == "padded"
    with pytest.raises(ValueError, match=r"batch.layout shared does not go with Gemma2ForCausalLM: .*; use"):
        load(family, "shared")


def load(family: str, layout: Layout) -> None:
    """What loading does about layouts."""
    hf = build(family)
    choose_layout(hf, layout)
    check_packs(hf)


def test_a_model_that_mixes_the_tokens_of_a_row_is_refused() -> None:
    """A convolution over places, say, would mix the sequences of a pack."""
    hf = build("llama")
    hf.model.layers[0].register_forward_hook(lambda module, args, output: output + output.roll(1, 1))
    choose_layout(hf, "packed")
    with pytest.raises(ValueError, match="does not give in a pack what it gives for rows on their own"):
        check_packs(hf)


def test_a_model_that_keeps_the_pack_from_its_attention_is_refused() -> None:
    """Its attention would see all tokens of the pack."""
    hf = build("llama")
    choose_layout(hf, "packed")
    for layer in hf.model.layers:
        layer.register_forward_pre_hook(
            lambda module, args, kwargs: (args, {k: v for k, v in kwargs.items() if k != "pack"}), with_kwargs=True
        )
    with pytest.raises(ValueError, match="does not hand its attention what packs need"):
        check_packs(hf)


@few
@given(st.lists(st.integers(1, 6), max_size=5), st.integers(1, 80), st.integers(0, 99))
def test_prompts_stay_together_where_the_budget_allows(sizes: list[int], budget: int, seed: int) -> None:
    """Every row once, prompts counted once; a prompt that is not short, and whose rows fit, is in one part."""
    rng = random.Random(seed)
    asked = [rng.randint(1, 9) for _ in sizes]
    same = torch.tensor([number for number, size in enumerate(sizes) for _ in range(size)], dtype=torch.int64)
    prompts = torch.tensor([asked[number] for number in same.tolist()], dtype=torch.int64)
    responses = torch.tensor([rng.randint(0, 20) for _ in same], dtype=torch.int64)
    parts = split_prompts(prompts, responses, same, budget)
    assert sorted(row for part in parts for row in part.tolist()) == list(range(len(same)))
    for part in parts:
        cost = int(responses[part].sum()) + sum(asked[number] for number in same[part].unique().tolist())
        assert len(part) == 1 or cost <= budget
    for number, length in enumerate(asked):
        rows = (same == number).nonzero().squeeze(-1).tolist()
        if length + int(responses[rows].sum()) <= budget and length * CHEAP > int(responses[rows].sum()):
            assert sum(bool(set(rows) & set(part.tolist())) for part in parts) == 1


def test_parts_are_few_and_even() -> None:
    """Eight groups of 8 x 64 tokens and a prompt of 32: five parts of a budget of 1,024, of like size."""
    same = torch.arange(8).repeat_interleave(8)
    parts = split_prompts(torch.full((64,), 32), torch.full((64,), 64), same, 1024)
    tokens = [64 * len(part) + 32 * len(same[part].unique()) for part in parts]
    assert len(parts) == 5
    assert tokens == sorted(tokens, reverse=True)
    assert max(tokens) - min(tokens) <= 2 * (64 + 32)
