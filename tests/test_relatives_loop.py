"""Callbacks that act inside an optimiser step, in the loop: gradients against full logits in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lit_rlvr_callbacks import (
    ClipCov,
    EntropyAdvantage,
    EntropyBonus,
    KLCov,
    NegativeReinforcement,
    TruncatedImportance,
    ZeroVariance,
)
from runs import FLOAT32_NORMS, EvenTask, Recorder, tiny_module, tiny_trainer, train
from torch import Tensor

from lit_rlvr import Batch, RLVRDataModule
from lit_rlvr.advantages import Raw
from lit_rlvr.credit import CreditCallback
from lit_rlvr.engines import InProcessEngine
from lit_rlvr.hashing import hash_integers
from lit_rlvr.minibatch import MiniBatch
from lit_rlvr.policy import load_policy
from lit_rlvr.shaping import DynamicSampling

CALLBACKS: dict[str, Callable[[], CreditCallback]] = {
    "ClipCov": lambda: ClipCov(0.05, low=0.0, high=50.0),
    "KLCov": lambda: KLCov(0.1, 0.7),
    "EntropyBonus": lambda: EntropyBonus(0.3),
    "EntropyAdvantage": lambda: EntropyAdvantage(0.05, scope="mini_batch"),
}


class Weights(Callback):
    """Keeps the weights that each step's gradient was taken at."""

    def __init__(self) -> None:
        self.before: list[dict[str, Tensor]] = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        self.before.append({n: p.detach().clone() for n, p in pl_module.policy.named_parameters()})


@cache
def trained(name: str, micro_tokens: int) -> tuple[Any, Recorder, Weights]:
    """One phase of two steps, large enough that the second has left the old policy."""
    batch = Batch(prompts=4, responses=4, minibatch_prompts=2, micro_tokens=micro_tokens)
    module = tiny_module(batch=batch, optimizer=lambda p: torch.optim.SGD(p, lr=1.0))
    weights = Weights()
    return module, train(module, 2, CALLBACKS[name](), weights), weights


@pytest.mark.parametrize("name", CALLBACKS)
def test_gradients_do_not_depend_on_the_token_budget(name: str) -> None:
    """One row at a time, or all at once."""
    (_, one, _), (_, other, _) = trained(name, 1), trained(name, 10**6)
    assert len(one.gradients) == 2
    for first, second in zip(one.gradients, other.gradients, strict=True):
        assert max(g.abs().max() for g in first.values()) > 1e-6
        for parameter in first:
            torch.testing.assert_close(first[parameter], second[parameter], **FLOAT32_NORMS)


def flat(mini: MiniBatch, policy: Any) -> tuple[Tensor, ...]:
    """Log-probabilities, entropies, old ones, advantages and token numbers of all response tokens, from full logits."""
    facts, parts = mini.rollout, []
    for i in range(len(facts)):
        prompt, response = facts.prompt_ids[i][facts.prompt_mask[i]], facts.response_ids[i][facts.response_mask[i]]
        logp = policy.hf(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        size = len(response)
        parts.append(
            (
                logp.gather(1, response[:, None])[:, 0],
                -(logp.exp() * logp).sum(-1),
                facts.old_logprobs[i, :size].double(),
                mini.credit.advantage[i, :size].double(),
                facts.token_order()[i, :size],
            )
        )
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def reference_loss(name: str, mini: MiniBatch, policy: Any, step: int) -> Tensor:
    """The loss of one step as the papers write it; every response token is in the average."""
    logp, entropy, old, a, token = flat(mini, policy)
    if step == 0:
        old = logp.detach()
    if name == "EntropyAdvantage":
        a = a + torch.minimum(0.05 * entropy.detach(), a.abs() / 2)
    ratio = (logp - old).exp()
    clipped = ratio.clamp(0.8, 1.28)
    loss = -torch.minimum(ratio * a, clipped * a)
    n, now = len(a), logp.detach()
    cov = (a - a.mean()) * (now - now.mean())
    if name == "KLCov":
        top = cov.argsort(descending=True)[: int(0.1 * n)]
        loss[top] = loss[top] + 0.7 * (logp - old).abs()[top]
    elif name == "ClipCov":
        may = (cov > 0) & (cov < 50) & (ratio * a <= clipped * a)
        lot = hash_integers(0, step, mini.rollout.uid[0, 0], token) & ((1 << 63) - 1)
        drawn = sorted(may.nonzero()[:, 0].tolist(), key=lambda i: -int(lot[i]))[: int(0.05 * n)]
        assert 0 < len(drawn) == int(0.05 * n) < int(may.sum())
        loss[drawn] = loss[drawn] * 0
    elif name == "EntropyBonus":
        loss = loss - 0.3 * entropy
    return loss.mean()


@pytest.mark.parametrize("name", CALLBACKS)
@pytest.mark.parametrize("step", [0, 1])
def test_gradient_equals_a_plain_transcription(name: str, step: int) -> None:
    """The phase's first step, where the policy is the old one, and the second, where it is not any more."""
    module, recorder, weights = trained(name, 10**6)
    policy = load_policy(module.tokenizer.name_or_path, "float64")
    policy.load_state_dict(weights.before[step], strict=False)
    reference_loss(name, module.phase.minibatches[step], policy, step).backward()
    expected = {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}
    assert expected.keys() == recorder.gradients[step].keys()
    for parameter, gradient in recorder.gradients[step].items():
        # Old log-probabilities are kept in float32, so ratios after the first update are off by up to 6e-8 of
        # themselves; entropies that shape advantages are float32, too.
        torch.testing.assert_close(gradient, expected[parameter], rtol=1e-5, atol=1e-7)


def test_they_leave_their_numbers_in_the_log() -> None:
    """About each optimiser step where they act in it, about the phase where not."""
    _, recorder, _ = trained("KLCov", 10**6)
    for step in recorder.metrics:
        assert step["credit/KLCov/held_fraction"] == pytest.approx(0.1, abs=0.02)
        assert step["credit/KLCov/covariance_held"] > step["credit/KLCov/covariance"]
    _, recorder, _ = trained("ClipCov", 10**6)
    assert all(step["credit/ClipCov/dropped_fraction"] > 0 for step in recorder.metrics)
    _, recorder, _ = trained("EntropyBonus", 10**6)
    assert recorder.metrics[0]["credit/EntropyBonus/coefficient"] == 0.3
    assert recorder.metrics[0]["train/penalty"] == pytest.approx(-0.3 * recorder.metrics[0]["train/entropy"], rel=0.1)


def test_the_first_step_of_a_phase_has_a_ratio_of_exactly_1() -> None:
    """Rounding of the old log-probabilities would give |log ratio| a gradient of full size and random sign."""
    module, recorder, weights = trained("KLCov", 10**6)
    assert recorder.metrics[0]["train/ratio_max"] == recorder.metrics[0]["train/ratio_min"] == 1.0
    assert recorder.metrics[1]["train/ratio_max"] > 1.0
    policy = load_policy(module.tokenizer.name_or_path, "float64")
    policy.load_state_dict(weights.before[0], strict=False)
    logp, _, old, _, _ = flat(module.phase.minibatches[0], policy)
    assert 0 < float((logp - old).detach().abs().max()) < 1e-6


def test_entropy_advantage_is_the_same_on_micro_batches() -> None:
    """Each token is for itself, so the training forward's entropies serve as well as the scoring pass's."""
    batch = Batch(prompts=4, responses=4, minibatch_prompts=2, micro_rows=3)
    small = train(
        tiny_module(batch=batch, optimizer=lambda p: torch.optim.SGD(p, lr=1.0)),
        2,
        EntropyAdvantage(0.05, scope="micro_batch"),
    )
    for one, other in zip(small.gradients, trained("EntropyAdvantage", 10**6)[1].gradients, strict=True):
        for parameter in one:
            torch.testing.assert_close(one[parameter], other[parameter], rtol=1e-5, atol=1e-7)


def test_covariances_on_micro_batches() -> None:
    """Two callbacks on four micro-batches of two rows; each holds and drops its own."""
    batch = Batch(prompts=4, responses=4, minibatch_prompts=2, micro_rows=2)
    module = tiny_module(batch=batch, optimizer=lambda p: torch.optim.SGD(p, lr=1.0))
    recorder = train(module, 2, KLCov(0.01, scope="micro_batch"), ClipCov(0.01, -50.0, 50.0, "micro_batch"))
    for step, mini in zip(recorder.metrics, module.phase.minibatches, strict=True):  # type: ignore[union-attr]
        parts = mini.rollout.lengths.split(2)
        # One token each, because 1 % of a micro-batch's tokens are less than one.
        wanted = sum(1 / int(part.sum()) for part in parts) / len(parts)
        assert step["credit/KLCov/held_fraction"] == pytest.approx(wanted)


class FarEngine(InProcessEngine):
    """An engine whose probabilities are e^-5 of the training model's."""

    def exact(self, precision: str) -> bool:
        return False

    def generate(self, *args: Any) -> Any:
        out = super().generate(*args)
        return replace(out, logprobs=out.logprobs - 5.0, entropies=None)


def test_importance_weights_reach_the_loss() -> None:
    """Ratios of e^5, cut at 2, double the gradient."""
    plain, doubled = train(tiny_module(), 1), train(tiny_module(engine=FarEngine()), 1, TruncatedImportance(2.0))
    for parameter, gradient in plain.gradients[0].items():
        torch.testing.assert_close(doubled.gradients[0][parameter], 2 * gradient)
    assert doubled.metrics[0]["credit/TruncatedImportance/mean_weight"] == 2.0
    assert doubled.metrics[0]["credit/TruncatedImportance/truncated"] == 1.0


def test_negative_samples_alone_learn_under_nsr() -> None:
    """The reward is minus the share of wrong responses, and what learns has a negative advantage."""
    module = tiny_module(advantage=Raw())
    metrics = train(module, 1, NegativeReinforcement(0.0, -1.0)).metrics[0]
    assert 0 < metrics["rollout/correct"] < 1
    assert metrics["rollout/shaped_reward"] == pytest.approx(metrics["rollout/correct"] - 1)
    assert module.phase is not None
    facts, credit = module.phase.rollout, module.phase.credit
    assert torch.equal(credit.advantage, -(facts.correct == 0).float()[:, None] * facts.response_mask)


def test_the_adaptive_bonus_resumes_exactly(tmp_path: Any) -> None:
    """Weights and coefficient after a stop between two phases are those of the run that went on."""

    def run(steps: int, ckpt: str | None = None) -> tuple[Any, EntropyBonus, str]:
        bonus = EntropyBonus(0.25, target=math.inf, delta=0.25)
        module = tiny_module()
        trainer = tiny_trainer(steps, [bonus])
        trainer.fit(module, datamodule=RLVRDataModule(EvenTask()), ckpt_path=ckpt)
        path = str(tmp_path / f"{steps}.ckpt")
        trainer.save_checkpoint(path)
        return module, bonus, path

    straight, one, _ = run(4)
    _, stopped, path = run(2)
    resumed, other, _ = run(4, path)
    assert stopped.state_dict() == {"next": 0.5, "applied": 0.25}
    assert one.state_dict() == other.state_dict() == {"next": 0.75, "applied": 0.5}
    for first, second in zip(straight.policy.parameters(), resumed.policy.parameters(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("callback", "options", "message"),
    [
        (NegativeReinforcement(), {}, "use advantage: Raw"),
        (
            NegativeReinforcement(),
            {"advantage": Raw(), "dynamic_sampling": DynamicSampling(2)},
            "dynamic_sampling: null",
        ),
        (ZeroVariance(), {"dynamic_sampling": DynamicSampling(2)}, "dynamic_sampling: null"),
        (TruncatedImportance(), {}, "would change nothing"),
    ],
)
def test_the_run_asks_them(callback: CreditCallback, options: dict[str, Any], message: str) -> None:
    """Before anything is trained."""
    with pytest.raises(ValueError, match=message):
        train(tiny_module(**options), 1, callback)
