"""EntropyTopK's presets against transcriptions of the published rules, against TRL, and in the loop."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import Callback
from lit_rlvr_callbacks import EntropyTopK
from rollouts import ThreadedReduce, build_rollout, full_credit, padded, random_rollout, run_ranks
from runs import tiny_module, train
from torch import Tensor
from torch.testing import assert_close
from trl_source import trl_entropy_mask, trl_loss

from lit_rlvr import Batch
from lit_rlvr.credit import CreditContext, assign_credit
from lit_rlvr.losses import ClippedSurrogate
from lit_rlvr.policy import load_policy
from lit_rlvr.reduce import LocalReduce, Reduce
from lit_rlvr.types import Credit, Current, RolloutBatch

few = settings(max_examples=30, deadline=None, derandomize=True)


def choose(
    callback: EntropyTopK, rollout: RolloutBatch, current: Tensor, reduce: Reduce | None = None
) -> tuple[Credit, dict[str, float]]:
    """The credit of a micro-batch whose current entropies [B, T] are given, and what was logged."""
    ctx = CreditContext(reduce=reduce or LocalReduce(), current=Current(torch.zeros_like(current), current))
    return assign_credit([callback], rollout, full_credit(rollout), ctx, "micro_batch"), ctx.metrics


def released_code(entropies: Tensor, mask: Tensor, rho: float) -> Tensor:
    """The authors' rule: the k = ceil(rho N) largest entropies among the N response tokens of a micro-batch."""
    flat, kept = entropies[mask], torch.zeros_like(mask)
    best = torch.zeros(len(flat), dtype=torch.bool)
    best[flat.topk(math.ceil(rho * len(flat))).indices] = True
    kept[mask] = best
    return kept


@st.composite
def micro_batches(draw: st.DrawFn, tied: bool) -> tuple[RolloutBatch, Tensor]:
    """A rollout, and current entropies that are not its old ones."""
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=5))
    n = sum(lengths)
    if tied:
        values = draw(st.lists(st.one_of(st.sampled_from([0.0, 0.5]), st.floats(0, 3)), min_size=n, max_size=n))
    else:
        values = [7 * place / n for place in draw(st.permutations(range(n)))]
    rows = [[values.pop() for _ in range(length)] for length in lengths]
    return build_rollout([[1.0] * length for length in lengths]), padded(rows)


@few
@given(micro_batches(tied=False), st.floats(0.01, 1))
def test_the_papers_choice(micro: tuple[RolloutBatch, Tensor], rho: float) -> None:
    """v2 takes dropped tokens out of the denominator as well, v1 does not."""
    rollout, current = micro
    wanted = released_code(current, rollout.response_mask, rho).float()
    v2, _ = choose(EntropyTopK(rho, preset="paper_v2"), rollout, current)
    v1, _ = choose(EntropyTopK(rho, preset="paper_v1"), rollout, current)
    assert torch.equal(v2.weight, wanted)
    assert torch.equal(v2.count, wanted)
    assert torch.equal(v1.weight, wanted)
    assert torch.equal(v1.count, rollout.response_mask.float())


@few
@given(micro_batches(tied=True), st.floats(0.01, 0.99))
def test_trls_choice(micro: tuple[RolloutBatch, Tensor], rho: float) -> None:
    """Token for token, ties and interpolation included; every token stays in the denominator."""
    rollout, current = micro
    after, _ = choose(EntropyTopK(rho, preset="trl"), rollout, current)
    assert torch.equal(after.weight > 0, trl_entropy_mask(current, rollout.response_mask, rho))
    assert torch.equal(after.count, rollout.response_mask.float())


@few
@given(micro_batches(tied=True), micro_batches(tied=True), st.floats(0.01, 0.99), st.booleans())
def test_trls_choice_on_two_ranks(
    one: tuple[RolloutBatch, Tensor], two: tuple[RolloutBatch, Tensor], rho: float, idle: bool
) -> None:
    """The quantile is one of both ranks' tokens; a rank may have none. The paper's code looks at its own alone."""
    nobody = torch.zeros(0, dtype=torch.int64)
    parts = [one, (two[0].rows(nobody), two[1][nobody]) if idle else two]
    everywhere = torch.cat([current[rollout.response_mask] for rollout, current in parts])

    def rank(preset: Any) -> Callable[[ThreadedReduce], Any]:
        return lambda reduce: choose(EntropyTopK(rho, preset=preset), *parts[reduce.rank], reduce)

    shared, alone = run_ranks(2, rank("trl")), run_ranks(2, rank("paper_v2"))
    for (rollout, current), (credit, _) in zip(parts, shared, strict=True):
        assert torch.equal(credit.weight > 0, trl_entropy_mask(current, rollout.response_mask, rho, everywhere))
    for part, (credit, _) in zip(parts, alone, strict=True):
        assert torch.equal(credit.weight, choose(EntropyTopK(rho, preset="paper_v2"), *part)[0].weight)
    for (_, first), (_, second) in (shared, alone):
        assert first == second, "what is logged is about both"


def test_trls_loss() -> None:
    """Value and gradient of TRL's whole loss with ``top_entropy_quantile``, one micro-batch, its default averaging."""
    rollout = random_rollout([3, 3], 9, seed=4)
    mask, generator = rollout.response_mask, torch.Generator().manual_seed(1)
    old, current, noise = (torch.rand(mask.shape, generator=generator).double() for _ in range(3))
    logprobs, advantage = old + noise - 0.5, torch.tensor([1.0, -1.0, 0.5, -0.5, 2.0, 0.0]).double()
    inputs = {
        "prompt_ids": rollout.prompt_ids, "prompt_mask": rollout.prompt_mask, "completion_ids": rollout.response_ids,
        "completion_mask": mask.int(), "advantages": advantage, "old_per_token_logps": old,
        "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    theirs_at, ours_at = (logprobs.clone().requires_grad_() for _ in range(2))
    theirs, _ = trl_loss(theirs_at, inputs, "dapo", 0.0, None, entropies=current.float(), top_entropy_quantile=0.3)
    credit, _ = choose(EntropyTopK(0.3, preset="trl"), rollout, current.float())
    assert 0 < float(credit.weight.sum()) < float(mask.sum())
    surrogate = ClippedSurrogate(0.2, 0.28).surrogate(ours_at - old, advantage[:, None])
    ours = -(credit.weight.double() * surrogate).sum() / credit.count.double().sum()
    assert_close(ours, theirs)
    assert_close(torch.autograd.grad(ours, ours_at), torch.autograd.grad(theirs, theirs_at))


def test_random_and_bottom_are_controls_of_every_reading() -> None:
    """The same number of tokens in the same micro-batch as the paper's choice."""
    rollout = random_rollout([4], 9, seed=2)
    current = torch.rand(rollout.response_mask.shape)
    counts = [
        int((choose(EntropyTopK(0.3, select, preset="paper_v2"), rollout, current)[0].weight > 0).sum())
        for select in ("top", "bottom", "random")
    ]
    assert counts == [math.ceil(0.3 * int(rollout.response_mask.sum()))] * 3


def test_old_entropies_on_a_micro_batch() -> None:
    """``source: old`` reads the rollout's, whatever the current policy says."""
    rollout = build_rollout([[0.1, 0.9, 0.5], [0.7, 0.2]])
    callback = EntropyTopK(0.4, preset="paper_v2", source="old")
    assert not callback.reads_current
    after, _ = choose(callback, rollout, -rollout.entropies)
    assert after.weight.tolist() == [[0, 1, 0], [1, 0, 0]]


# -- in the loop ---------------------------------------------------------------------------------------------------


class Weights(Callback):
    """Keeps the weights that each step began with."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.seen.append({name: value.clone() for name, value in pl_module.policy.state_dict().items()})


def batch(**sizes: Any) -> Batch:
    """4 prompts x 4 responses, two steps."""
    return Batch(prompts=4, responses=4, minibatch_prompts=2, **sizes)


def reference_gradient(module: Any, weights: dict[str, Tensor], preset: str, rows: int) -> dict[str, Tensor]:
    """The second step's gradient from full logits and the published rule, ``rows`` responses to a micro-batch."""
    policy = load_policy(module.tokenizer.name_or_path, "float64")
    policy.load_state_dict(weights)
    mini = module.phase.minibatches[1]
    facts, credit = mini.rollout, mini.credit
    surrogates, entropies = [], []
    for i in range(len(facts)):
        prompt = facts.prompt_ids[i][facts.prompt_mask[i]]
        response = facts.response_ids[i][facts.response_mask[i]]
        logits = policy.hf(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
        logp = logits.log_softmax(-1)
        a = credit.advantage[i, : len(response)].double()
        ratio = (logp.gather(1, response[:, None])[:, 0] - facts.old_logprobs[i, : len(response)].double()).exp()
        surrogates.append(torch.minimum(ratio * a, ratio.clamp(0.8, 1.28) * a))
        entropies.append(-(logp.exp() * logp).sum(-1).detach())
    loss, sequences, tokens = torch.zeros(()).double(), len(facts), int(facts.response_mask.sum())
    for start in range(0, sequences, rows):
        surrogate, entropy = (torch.cat(part[start : start + rows]) for part in (surrogates, entropies))
        n = len(entropy)
        if preset == "trl":
            kept = entropy >= torch.quantile(entropy, 0.7)
            loss = loss - (surrogate * kept).sum() / tokens
        else:
            k = math.ceil(0.3 * n)
            chosen = surrogate[entropy.topk(k).indices].sum()
            share = min(rows, sequences - start) / sequences
            loss = loss - share * chosen / (k if preset == "paper_v2" else n)
    loss.backward()
    return {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("preset", ["paper_v2", "paper_v1", "trl"])
def test_a_steps_gradient_is_the_published_one(preset: Any) -> None:
    """On a policy that has left the old one; the last micro-batch of 8 responses by 3 is smaller."""
    module, weights = tiny_module(batch=batch(micro_rows=3)), Weights()
    recorder = train(module, 2, EntropyTopK(0.3, preset=preset), weights)
    wanted = reference_gradient(module, weights.seen[1], preset, 3)
    assert wanted.keys() == recorder.gradients[1].keys()
    for name, gradient in recorder.gradients[1].items():
        # Old log-probabilities are kept in float32: a ratio is off by up to 1e-6, a gradient (of order 1) by as much.
        assert_close(gradient, wanted[name], rtol=1e-5, atol=1e-7)
    logged = recorder.metrics[1]
    assert 0.3 <= logged["credit/EntropyTopK/kept_fraction"] < 0.4
    assert logged["credit/EntropyTopK/entropy_kept"] > logged["credit/EntropyTopK/entropy_dropped"]


def test_current_entropies_on_a_mini_batch() -> None:
    """The published rule with the whole mini-batch for a micro-batch; no choice depends on the token budget."""
    runs = []
    for budget in (60, 10**6):
        module, weights = tiny_module(batch=batch(micro_tokens=budget)), Weights()
        callback = EntropyTopK(0.3, source="current", scope="mini_batch")
        runs.append(train(module, 2, callback, weights))
    wanted = reference_gradient(module, weights.seen[1], "paper_v2", 8)
    for run in runs:
        for name, gradient in run.gradients[1].items():
            assert_close(gradient, wanted[name], rtol=1e-5, atol=1e-7)  # as above
    old = train(tiny_module(batch=batch()), 2, EntropyTopK(0.3, scope="mini_batch"))
    assert any(not torch.allclose(g, wanted[n], rtol=1e-3) for n, g in old.gradients[1].items())


def test_a_micro_batch_needs_its_number_of_rows() -> None:
    """With a token budget the choice would depend on memory."""
    with pytest.raises(ValueError, match=r"EntropyTopK decides per micro-batch.* set batch\.micro_rows"):
        train(tiny_module(), 1, EntropyTopK(preset="paper_v2"))


def test_the_seed_of_a_control_is_the_runs() -> None:
    """Random tokens of a micro-batch differ between seeds and not between epochs."""
    rollout = random_rollout([4], 9, seed=2)
    current = torch.rand(rollout.response_mask.shape)

    def picked(seed: int, update: int) -> Tensor:
        ctx = CreditContext(seed=seed, update=update, current=Current(current, current))
        callback = EntropyTopK(0.3, "random", preset="paper_v2")
        return assign_credit([callback], rollout, replace(full_credit(rollout)), ctx, "micro_batch").weight

    assert torch.equal(picked(1, 0), picked(1, 7))
    assert not torch.equal(picked(1, 0), picked(2, 0))
