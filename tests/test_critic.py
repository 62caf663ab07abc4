"""The critic: its loss, its parameters beside the policy's, and PPO in the loop against a plain transcription."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import Callback
from lit_rlvr_callbacks import EntropyTopK
from runs import FLOAT32_NORMS, EvenTask, Recorder, tiny_module, tiny_trainer
from torch import Tensor
from torch.testing import assert_close

from lit_rlvr import Batch, RLVRDataModule, RLVRModule
from lit_rlvr.critic import Critic, ValueModel
from lit_rlvr.gae import GAE
from lit_rlvr.kl import KLPenalty

LAWS = settings(max_examples=50, deadline=None, derandomize=True)
NUMBER = st.floats(-4, 4)


class CriticRecorder(Callback):
    """Keeps the critic's gradients of every step, and the values that the phase was scored with."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, Tensor]] = []
        self.values: list[Tensor] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        named = pl_module.critic.named_parameters()
        self.gradients.append({name: p.grad.detach().clone() for name, p in named if p.grad is not None})
        self.values.append(pl_module._mini.rollout.values)


def ppo(**options: Any) -> RLVRModule:
    return tiny_module(advantage=GAE(), critic=Critic(lr=1e-2), **options)


def train(module: RLVRModule, steps: int, *callbacks: Callback, **options: Any) -> tuple[Recorder, CriticRecorder]:
    policy, critic = Recorder(), CriticRecorder()
    trainer = tiny_trainer(steps, [*callbacks, policy, critic], **options)
    trainer.fit(module, datamodule=RLVRDataModule(EvenTask()))
    return policy, critic


def test_value_loss_by_hand() -> None:
    """Clip .2 round an old value of 0: for a return of 1 a value of .5 counts as .2, one of 2 as itself."""
    values, old, returns = (torch.tensor(x) for x in ([0.5, 2.0, 0.1, -0.5], [0.0] * 4, [1.0, 1.0, 1.0, -1.0]))
    loss, held = Critic(clip=0.2).loss(values, old, returns)
    assert_close(loss, torch.tensor([0.8**2, 1.0, 0.9**2, 0.8**2]) / 2)
    assert held.tolist() == [True, False, False, True]
    assert_close(Critic(clip=None).loss(values, old, returns)[0], (values - returns) ** 2 / 2)


@LAWS
@given(NUMBER, NUMBER, NUMBER, st.floats(0.01, 2))
def test_value_loss_transcribed(value: float, old: float, target: float, clip: float) -> None:
    loss, held = Critic(clip=clip).loss(*(torch.tensor(x, dtype=torch.float64) for x in (value, old, target)))
    near = np.clip(value, old - clip, old + clip)
    want = 0.5 * max((value - target) ** 2, (near - target) ** 2)
    assert_close(loss, torch.tensor(want, dtype=torch.float64))
    assert float(loss) >= 0.5 * (value - target) ** 2 - 1e-12
    if abs((near - target) ** 2 - (value - target) ** 2) > 1e-9:  # a tie may round either way
        assert bool(held) == ((near - target) ** 2 > (value - target) ** 2)


@pytest.mark.parametrize("options", [{"lr": 0.0}, {"clip": 0.0}])
def test_wrong_settings_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"critic.{next(iter(options))} must be > 0"):
        Critic(**options)


def test_critic_and_advantage_go_together() -> None:
    with pytest.raises(ValueError, match="GAE needs values; add a critic"):
        tiny_module(advantage=GAE())
    with pytest.raises(ValueError, match="GroupNormalized does not use it; use advantage: GAE"):
        tiny_module(critic=Critic())
    with pytest.raises(ValueError, match="clipped apart, by norm"):
        train(ppo(), 1, gradient_clip_algorithm="value", gradient_clip_val=1.0)


def test_gradients_do_not_depend_on_the_token_budget() -> None:
    """Policy's and critic's, over two phases of two updates, with a selection that the critic ignores."""
    runs = []
    for budget in (1, 60, 10**6):
        module = ppo(batch=Batch(prompts=4, responses=4, minibatch_prompts=2, micro_tokens=budget))
        runs.append(train(module, 4, EntropyTopK(0.3)))
    assert max(g.abs().max() for g in runs[0][1].gradients[1].values()) > 1e-3
    for other in runs[1:]:
        for mine, theirs in zip(runs[0], other, strict=True):
            for first, second in zip(mine.gradients, theirs.gradients, strict=True):
                for parameter in first:
                    assert_close(first[parameter], second[parameter], **FLOAT32_NORMS)


def test_critic_gradient_equals_a_plain_transcription() -> None:
    """Mean over all response tokens of half the clipped squared error, one response at a time in float64."""
    module = ppo()
    _, recorder = train(module, 3, EntropyTopK(0.3))
    assert recorder.values[0].abs().max() == 0  # the head starts at zero
    assert recorder.values[2].abs().max() > 0.01  # and has been trained when the second phase is scored
    fresh, again = ValueModel(module.tokenizer.name_or_path, "float64"), ppo()
    recorded = train(again, 1)[1]
    phase = again.phase
    assert phase is not None
    mini = phase.minibatches[0]
    facts, total, tokens = mini.rollout, torch.zeros((), dtype=torch.float64), 0
    for i in range(len(facts)):
        prompt, response = facts.prompt_ids[i][facts.prompt_mask[i]], facts.response_ids[i][facts.response_mask[i]]
        hidden = fresh.body(input_ids=torch.cat([prompt, response])[None]).last_hidden_state[0]
        values = fresh.head(hidden[len(prompt) - 1 : -1]).squeeze(-1)
        # gamma = lam = 1: the return of every token is the response's reward.
        target, old = facts.rewards[i].double(), torch.zeros_like(values)
        near = old + (values - old).clamp(-0.2, 0.2)
        total = total + torch.maximum((values - target) ** 2, (near - target) ** 2).sum() / 2
        tokens += len(response)
    (total / tokens).backward()
    expected = {n: p.grad for n, p in fresh.named_parameters() if p.grad is not None}
    assert expected["head.weight"].abs().max() > 1e-3
    for name, gradient in recorded.gradients[0].items():
        assert_close(gradient, expected[name])


def test_policy_and_critic_are_clipped_apart() -> None:
    """Each to the norm of .01, though the critic's gradient is many times the policy's."""
    norms: list[list[float]] = []

    class Norms(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            out = super().step(closure)
            groups = [[p.grad for p in group["params"] if p.grad is not None] for group in self.param_groups]
            norms.append([float(torch.nn.utils.get_total_norm(g)) for g in groups])
            return out

    module = ppo(optimizer=lambda p: Norms(p, lr=1e-3))
    policy, _ = train(module, 2, gradient_clip_val=0.01)
    assert norms == [pytest.approx([0.01, 0.01], rel=1e-3)] * 2
    before = [(step["train/grad_norm"], step["train/critic_grad_norm"]) for step in policy.metrics]
    assert all(max(pair) > 0.01 for pair in before)


def test_learning_rates_and_metrics() -> None:
    """The critic's own rate; value loss, clip share and norm in the log."""
    module = ppo()
    policy, _ = train(module, 2)
    assert [g["lr"] for g in module.trainer.optimizers[0].param_groups] == [1e-3, 1e-2]
    assert {"train/value_loss", "train/value_clip", "train/critic_grad_norm"} <= policy.metrics[0].keys()
    assert policy.metrics[0]["train/value_loss"] == pytest.approx(0.5 * policy.metrics[0]["rollout/reward"], abs=0.2)


def test_kl_in_the_reward_is_paid_token_by_token() -> None:
    """With a critic a token's return holds the KL of what follows it, not of what came before."""
    module = ppo(kl=KLPenalty(beta=1.0, estimator="k2", where="reward"))
    train(module, 3)
    assert module.phase is not None
    spread = 0.0
    for mini in module.phase.minibatches:
        assert mini.returns is not None
        assert mini.rollout.ref_logprobs is not None
        facts = mini.rollout
        paid = (0.5 * (facts.old_logprobs - facts.ref_logprobs) ** 2 * facts.response_mask).double()
        following = paid.flip(1).cumsum(1).flip(1)
        whole = facts.rewards.double() + paid.sum(-1)
        assert_close(mini.returns.double(), (whole[:, None] - following) * facts.response_mask, rtol=1e-5, atol=1e-6)
        spread = max(spread, float(paid.sum(-1).max()))
    assert spread > 1e-6
