"""What callbacks may do beside a phase's credit: rewards, mini-batches, micro-batches, penalties; GSPO in the loop."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from lit_rlvr_callbacks import EntropyTopK, PerplexityShaping
from rollouts import build_rollout, full_credit
from runs import FLOAT32_NORMS, tiny_module, train
from torch import Tensor
from torch.testing import assert_close

from lit_rlvr import Batch, Credit, CreditCallback, CreditContext, RolloutBatch
from lit_rlvr.aggregation import SequenceMean
from lit_rlvr.credit import assign_credit, penalties, shape_rewards
from lit_rlvr.losses import GSPO
from lit_rlvr.policy import load_policy
from lit_rlvr.scoring import score
from lit_rlvr.types import Tokens


def sizes(micro_tokens: int = 10**6, **options: Any) -> Batch:
    return Batch(prompts=4, responses=4, minibatch_prompts=2, micro_tokens=micro_tokens, **options)


class Current(CreditCallback):
    """Weighs tokens by their current probability, and remembers what it was shown."""

    def __init__(self, scope: Any, own: bool = False) -> None:
        super().__init__()
        self.scope, self.own_denominator, self.reads_current = scope, own, True
        self.seen: list[tuple[RolloutBatch, Tensor, Tensor]] = []

    def assign(self, credit: Credit, rollout: RolloutBatch, ctx: CreditContext) -> Credit:
        assert ctx.current is not None
        self.seen.append((rollout, ctx.current.logprobs, ctx.current.entropies))
        ctx.log("rows", len(rollout))
        weight = credit.weight * ctx.current.logprobs.exp()
        return replace(credit, weight=weight, count=weight.clone() if self.own_denominator else credit.count)


class Pull(CreditCallback):
    """Holds every token at the old policy."""

    def assign(self, credit: Credit, rollout: RolloutBatch, ctx: CreditContext) -> Credit:
        return replace(credit, kl_coef=0.5 * rollout.response_mask)


class Bonus(CreditCallback):
    """Adds .3 times the squared log-probability less the entropy, per token."""

    def penalty(self, tokens: Tokens, ctx: CreditContext) -> Tensor:
        return 0.3 * tokens.logprobs**2 - tokens.entropies


def gradients(module: Any, steps: int, *callbacks: CreditCallback) -> list[dict[str, Tensor]]:
    return train(module, steps, *callbacks).gradients


CASES: dict[str, tuple[Any, Any]] = {
    "mini-batch": (lambda: [Current("mini_batch")], {}),
    "penalty": (lambda: [EntropyTopK(0.3), Bonus()], {}),
    "pull": (lambda: [Pull()], {}),
    "gspo": (lambda: [PerplexityShaping(0.3)], {"loss": GSPO(0.01, 0.01), "aggregation": SequenceMean()}),
    "gspo token": (lambda: [EntropyTopK(0.3)], {"loss": GSPO(0.01, 0.01, level="token")}),
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_do_not_depend_on_the_token_budget(case: str) -> None:
    """One row at a time, some, all; over two phases of two updates."""
    chain, options = CASES[case]
    runs = [gradients(tiny_module(batch=sizes(b), **options), 4, *chain()) for b in (1, 60, 10**6)]
    assert max(g.abs().max() for g in runs[0][1].values()) > 1e-6
    for other in runs[1:]:
        for first, second in zip(runs[0], other, strict=True):
            for parameter in first:
                assert_close(first[parameter], second[parameter], **FLOAT32_NORMS)


def transcribed(module: Any, case: str) -> dict[str, Tensor]:
    """The first mini-batch's gradient from full logits in float64, row by row."""
    policy = load_policy(module.tokenizer.name_or_path, "float64")
    mini = module.phase.minibatches[0]
    facts, credit, total, tokens, kept = mini.rollout, mini.credit, torch.zeros(()).double(), 0, 0.0
    for i in range(len(facts)):
        prompt, response = facts.prompt_ids[i][facts.prompt_mask[i]], facts.response_ids[i][facts.response_mask[i]]
        n = len(response)
        logp = policy.hf(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        chosen, entropy = logp.gather(1, response[:, None])[:, 0], -(logp.exp() * logp).sum(-1)
        old, a, w = facts.old_logprobs[i, :n].double(), credit.advantage[i, :n].double(), credit.weight[i, :n].double()
        ratio = (chosen - old).exp()
        if case == "gspo":
            ratio = (chosen - old).mean().exp().expand(n)
            total = total - torch.minimum(ratio * a, ratio.clamp(0.99, 1.01) * a).mean() / len(facts)
        elif case == "mini-batch":
            total = total - (chosen.detach().exp() * ratio * a).sum()
        elif case == "penalty":
            total = total + (0.3 * chosen**2 - entropy).sum()
            kept = kept - (w * ratio * a).sum()
        tokens += n
    if case == "mini-batch":
        total = total / tokens
    elif case == "penalty":
        total = total / tokens + kept / float(credit.count.sum())
    total.backward()
    return {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("case", ["mini-batch", "penalty", "gspo"])
def test_gradient_equals_a_plain_transcription(case: str) -> None:
    chain, options = CASES[case]
    module = tiny_module(batch=sizes(60), **options)
    (got,) = gradients(module, 1, *chain())
    expected = transcribed(module, case)
    assert got.keys() == expected.keys()
    for parameter, gradient in got.items():
        # Facts and weights are kept in float32 (6e-8 relative), and ratios are 1 up to as much.
        assert_close(gradient, expected[parameter], rtol=1e-5, atol=2e-7)


def test_pull_is_the_distance_to_the_old_policy() -> None:
    """No gradient in a phase's first update, where the policy is the old one; afterwards it points back."""
    plain, pulled = (train(tiny_module(batch=sizes()), 2, *chain) for chain in ([], [Pull()]))
    assert plain.metrics[0]["train/loss"] == pytest.approx(pulled.metrics[0]["train/loss"], abs=1e-6)
    difference = pulled.metrics[1]["train/loss"] - plain.metrics[1]["train/loss"]
    assert difference > 1e-5


def test_a_mini_batch_callback_sees_the_policy_of_its_step() -> None:
    """Step 1: the old policy, without a pass; step 2: what step 1 made of it."""
    callback = Current("mini_batch")
    module = tiny_module(batch=sizes())
    train(module, 2, callback)
    (first, logprobs, entropies), (second, moved, _) = callback.seen
    assert torch.equal(logprobs, first.old_logprobs)
    assert torch.equal(entropies, first.entropies)
    assert float((moved - second.old_logprobs).abs().max()) > 1e-5
    untrained = load_policy(module.tokenizer.name_or_path, "float64")
    assert float((score(untrained, second, 1.0, 1000)[0] - second.old_logprobs).abs().max()) < 1e-5
    assert len(callback.seen) == 2


def test_a_micro_batch_callback_sees_its_rows_and_the_current_policy() -> None:
    """Three rows at a time of eight, in order; its metric is the mean over the micro-batches."""
    callback = Current("micro_batch")
    recorder = train(tiny_module(batch=sizes(micro_rows=3)), 2, callback)
    assert [len(rollout) for rollout, *_ in callback.seen] == [3, 3, 2, 3, 3, 2]
    assert recorder.metrics[0]["credit/Current/rows"] == pytest.approx(8 / 3)
    for rollout, logprobs, entropies in callback.seen[:3]:
        assert_close(logprobs, rollout.old_logprobs, rtol=1e-5, atol=1e-5)  # the first update; facts in float32
        assert_close(entropies, rollout.entropies, rtol=1e-5, atol=1e-5)
        assert not bool(logprobs[~rollout.response_mask].any())


def test_own_denominators_average_over_micro_batches() -> None:
    """Each micro-batch's mean with its share of the sequences: what code that averages over micro-batches trains."""
    module = tiny_module(batch=sizes(micro_rows=3))
    (got,) = gradients(module, 1, Current("micro_batch", own=True))
    policy = load_policy(module.tokenizer.name_or_path, "float64")
    mini = module.phase.minibatches[0]  # type: ignore[union-attr]
    facts, total = mini.rollout, torch.zeros(()).double()
    for start in (0, 3, 6):
        above, below = torch.zeros(()).double(), torch.zeros(()).double()
        rows = range(start, min(start + 3, 8))
        for i in rows:
            prompt, response = facts.prompt_ids[i][facts.prompt_mask[i]], facts.response_ids[i][facts.response_mask[i]]
            logits = policy.hf(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
            logp = logits.log_softmax(-1).gather(1, response[:, None])[:, 0]
            ratio = (logp - facts.old_logprobs[i, : len(response)].double()).exp()
            weight = logp.detach().exp()
            above = above + (weight * ratio * mini.credit.advantage[i, : len(response)].double()).sum()
            below = below + weight.sum()
        total = total - above / below * len(rows) / 8
    total.backward()
    for name, parameter in policy.named_parameters():
        assert parameter.grad is not None
        # As above: facts in float32.
        assert_close(got[name], parameter.grad, rtol=1e-5, atol=2e-7)


class Changes(Current):
    """Changes counts on a micro-batch without saying so."""

    def assign(self, credit: Credit, rollout: RolloutBatch, ctx: CreditContext) -> Credit:
        return replace(credit, count=credit.count * 2)


def test_undeclared_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="Changes changes `count` on a micro-batch without own_denominator"):
        train(tiny_module(batch=sizes(micro_rows=4)), 1, Changes("micro_batch"))


@pytest.mark.parametrize(
    ("options", "callback", "message"),
    [
        ({"batch": sizes()}, lambda: Current("micro_batch"), "Current decides per micro-batch.*set batch.micro_rows"),
        (
            {"batch": sizes(micro_rows=4)},
            lambda: EntropyTopK(0.5),
            "leave it null, as in --model.batch.micro_rows=null",
        ),
        ({"loss": GSPO()}, lambda: EntropyTopK(0.5), "GSPO has one ratio.*EntropyTopK cannot treat.*level: token"),
    ],
)
def test_what_does_not_go_together_is_refused(options: Any, callback: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(tiny_module(**options), 1, callback())


class Shaper(CreditCallback):
    """Maps rewards."""

    def __init__(self, fn: Any, stages: list[str] | None = None, name: str | None = None) -> None:
        super().__init__(stages, name)
        self.fn = fn

    def shape_rewards(self, rollout: RolloutBatch, rewards: Tensor, ctx: CreditContext) -> Tensor:
        return self.fn(rewards)  # type: ignore[no-any-return]


ROLLOUT = build_rollout([[0.1, 0.2], [0.3], [0.5]])  # rewards 0, 1, 2


def test_rewards_are_shaped_in_order_and_by_stage() -> None:
    chain = [
        Shaper(lambda r: r + 1, name="a"),
        Shaper(lambda r: r * 10, name="b"),
        Shaper(lambda r: r * 0, ["plateau"], "c"),
    ]
    assert shape_rewards(chain, ROLLOUT, CreditContext(stage="rising")).tolist() == [10.0, 20.0, 30.0]
    assert shape_rewards(chain, ROLLOUT, CreditContext(stage="plateau")).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("fn", [lambda r: r[:1], lambda r: r / 0])
def test_broken_rewards_name_their_author(fn: Any) -> None:
    with pytest.raises(ValueError, match="Shaper must return one finite reward per response"):
        shape_rewards([Shaper(fn)], ROLLOUT, CreditContext())


def test_shaped_rewards_reach_the_advantage_and_not_the_outcome() -> None:
    """Negated rewards turn advantages round; what is reported stays."""
    plain, turned = tiny_module(), tiny_module()
    one, other = train(plain, 1), train(turned, 1, Shaper(lambda r: -r))
    assert plain.phase is not None
    assert turned.phase is not None
    assert_close(turned.phase.credit.advantage, -plain.phase.credit.advantage)
    assert one.metrics[0]["rollout/reward"] == other.metrics[0]["rollout/reward"]
    assert other.metrics[0]["rollout/shaped_reward"] == pytest.approx(-one.metrics[0]["rollout/reward"])


def test_penalties_add_up_by_stage() -> None:
    half = torch.tensor([0.5, 1.0])
    tokens = Tokens(half.clone().requires_grad_(), half, half, half)
    always, later = Bonus(), Bonus(["plateau"], "later")
    one = penalties([always, later], tokens, CreditContext(stage="rising"))
    two = penalties([always, later], tokens, CreditContext(stage="plateau"))
    assert_close(one, 0.3 * half**2 - half)
    assert_close(two, 2 * one)
    assert two.requires_grad


def test_only_the_scope_s_callbacks_act() -> None:
    credit = full_credit(ROLLOUT)
    assert assign_credit([Current("mini_batch")], ROLLOUT, credit, CreditContext()) is credit
    assert assign_credit([EntropyTopK(0.5)], ROLLOUT, credit, CreditContext(), "mini_batch") is credit


def test_a_name_is_averaged_over_rounds_and_refused_twice_in_one() -> None:
    ctx = CreditContext()
    for value in (1.0, 2.0, 6.0):
        ctx.log("x", value)
        with pytest.raises(ValueError, match="logged twice"):
            ctx.log("x", value)
        ctx.leave()
    assert ctx.metrics == {"x": 3.0}
