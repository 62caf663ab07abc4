"""The parts that docs/extending.md shows are what it says they are."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_docs import DOCS, blocks
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoTokenizer
from trl_source import trl_function, trl_loss

from lit_rlvr.aggregation import SequenceMean, TokenMean
from lit_rlvr.engines import InProcessEngine, Sampling
from lit_rlvr.models import BUILTIN, TINY, resolve_model
from lit_rlvr.policy import load_policy
from lit_rlvr.tasks import Prompt

MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """Gives a class of the page, imported from its file."""
    monkeypatch.syspath_prepend(tmp_path)
    files = {str(b.file): b.text for b in blocks(DOCS / "extending.md") if b.language == "python"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    yield lambda module, name: getattr(import_module(module), name)
    for name in files:
        sys.modules.pop(name.removesuffix(".py"), None)


def random_logprobs(seed: int) -> Tensor:
    """Log-probabilities [3, 4], in float64."""
    return -torch.rand(3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 1


def test_the_loss_is_trls_sapo(part: Any) -> None:
    """Its loss and gradient, with the temperatures of the paper, and ratios on both sides of 1."""
    logprobs, old, advantage = random_logprobs(0), random_logprobs(1), torch.tensor([1.0, -0.7, -1.3]).double()
    inputs = {
        "prompt_ids": torch.zeros(3, 2),
        "prompt_mask": torch.ones(3, 2),
        "completion_ids": torch.zeros(3, 4),
        "completion_mask": MASK.long(),
        "advantages": advantage,
        "old_per_token_logps": old,
        "num_items_in_batch": MASK.sum(),
    }
    args = SimpleNamespace(
        delta=None, use_bias_correction_kl=False, steps_per_generation=1, sapo_temperature_pos=1.0,
        sapo_temperature_neg=1.05,
    )  # fmt: skip
    theirs_at = logprobs.clone().requires_grad_()
    theirs, _ = trl_loss(theirs_at, inputs, "sapo", 0.0, None, args=args)
    ours_at = logprobs.clone().requires_grad_()
    share = SequenceMean().share(MASK).double()
    objective = part("my_losses", "SAPO")().surrogate(ours_at - old, advantage[:, None])
    ours = -(share * objective).sum() / share.sum()
    assert_close(ours, theirs.double())
    assert_close(torch.autograd.grad(ours, ours_at), torch.autograd.grad(theirs, theirs_at))


def test_the_loss_begins_as_a_policy_gradient(part: Any) -> None:
    """At a ratio of 1 every temperature gives the gradient of A log pi; a ratio out of range has a finite one."""
    advantage = torch.tensor([1.0, -2.0, 0.5])
    at = torch.zeros(3, requires_grad=True)
    loss = part("my_losses", "SAPO")(tau_positive=0.7, tau_negative=3.0)
    loss.surrogate(at, advantage).sum().backward()
    assert_close(at.grad, advantage)
    far = torch.tensor([1000.0], requires_grad=True)
    loss.surrogate(far, advantage[:1]).sum().backward()
    assert far.grad is not None
    assert far.grad.tolist() == [0.0]
    assert not any(clip.any() for clip in loss.clipped(at.detach(), advantage))


def test_the_advantage_is_trls_rule(part: Any) -> None:
    """TRL's lines for ``scale_rewards: batch``: the mean of the group, and the unbiased deviation of all rewards."""
    nanstd = trl_function("trainer/utils.py", "nanstd")
    rewards = torch.tensor([0.0, 1, 1, 0.25, 0, 0, 0, 1, 1, 1, 1, -2])
    centred = rewards - rewards.view(3, 4).mean(1).repeat_interleave(4)
    rule, group = part("my_advantages", "BatchScaled")(), torch.arange(3).repeat_interleave(4)
    assert_close(rule(rewards, group), centred / (nanstd(rewards) + 1e-4))
    assert rule(rewards[:0], group[:0]).shape == (0,)


def test_the_aggregation_lies_between_two(part: Any) -> None:
    """At its ends it is the mean over tokens, and the mean over responses."""
    rule = part("my_aggregations", "LengthPower")
    assert_close(rule(0.0).share(MASK), TokenMean().share(MASK))
    assert_close(rule(1.0).share(MASK), SequenceMean().share(MASK))
    assert_close(rule(0.5).share(MASK)[2], torch.full((4,), 0.5))


def test_the_reward_falls_beyond_its_length(part: Any) -> None:
    reward = part("my_rewards", "Short")(characters=4)
    assert [reward(Prompt(0, ""), "x" * n).reward for n in (0, 4, 8)] == [1.0, 1.0, 0.5]


def test_the_engine_draws_what_the_in_process_engine_does(part: Any) -> None:
    """Greedy responses are the same; of drawn ones, the log-probabilities are those of the policy."""
    folder = resolve_model(BUILTIN + TINY)
    policy, tokenizer = load_policy(folder, "float32"), AutoTokenizer.from_pretrained(folder)
    prompts = [tokenizer("1+2?")["input_ids"], tokenizer("3*4-5?")["input_ids"]]
    uid = torch.tensor([[0, draw, sample] for draw in (0, 1) for sample in (0, 1)])
    engine = part("my_engines", "TransformersEngine")()
    greedy = Sampling(temperature=0, max_new_tokens=8)
    ours, theirs = (e.generate(policy, tokenizer, prompts, uid, greedy, 0) for e in (engine, InProcessEngine()))
    width = min(ours.ids.shape[1], theirs.ids.shape[1])
    assert torch.equal(ours.ids[:, :width], theirs.ids[:, :width])
    assert torch.equal(ours.mask.sum(-1), theirs.mask.sum(-1))
    assert torch.equal(ours.truncated, theirs.truncated)
    assert_close(ours.logprobs[:, :width], theirs.logprobs[:, :width])
    assert_close(ours.entropies[:, :width], theirs.entropies[:, :width])
    drawn = engine.generate(policy, tokenizer, prompts, uid, Sampling(max_new_tokens=8), 1)
    assert not torch.equal(drawn.ids[0], drawn.ids[1])
    with pytest.raises(ValueError, match="no stop strings"):
        engine.generate(policy, tokenizer, prompts, uid, Sampling(top_p=0.5), 1)
