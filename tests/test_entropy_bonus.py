"""EntropyBonus: its share of the loss, and the controller against a plain transcription and TRL's."""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lit_rlvr_callbacks import EntropyBonus
from rollouts import build_rollout, full_credit, run_chain, run_ranks
from torch import Tensor
from trl_source import trl_function

from lit_rlvr.credit import CreditContext, penalties
from lit_rlvr.schedule import Schedule
from lit_rlvr.types import Tokens


def bonus(callback: EntropyBonus, entropies: Tensor) -> Tensor:
    """What the loss of tokens with these entropies gets."""
    zeros = torch.zeros_like(entropies)
    return penalties([callback], Tokens(zeros, entropies, zeros, zeros), CreditContext())


def run(callback: EntropyBonus, entropies: list[float]) -> list[float]:
    """What is logged as the coefficient over phases of these mean entropies."""
    seen = []
    for step, entropy in enumerate(entropies):
        ctx, rollout = CreditContext(step=step), build_rollout([[entropy, entropy]])
        run_chain([callback], rollout, full_credit(rollout), ctx)
        seen.append(ctx.metrics["credit/EntropyBonus/coefficient"])
    return seen


def test_a_constant_coefficient() -> None:
    """Minus c times each token's entropy, with its gradient."""
    callback = EntropyBonus(0.5)
    assert run(callback, [1.0, 0.0]) == [0.5, 0.5]
    entropies = torch.tensor([0.0, 2.0], dtype=torch.float64, requires_grad=True)
    added = bonus(callback, entropies)
    assert added.tolist() == [0.0, -1.0]
    added.sum().backward()
    assert entropies.grad is not None
    assert entropies.grad.tolist() == [-0.5, -0.5]


def test_a_schedule_by_phase_and_by_stage() -> None:
    """The stage is known when the loss is taken, though not yet when the rollout is observed."""
    callback = EntropyBonus(Schedule("linear", 1.0, 0.0, 4))
    assert run(callback, [0.5] * 6) == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    by_stage = EntropyBonus(Schedule(rising=0.1, plateau=0.2))
    tokens = Tokens(*(torch.ones(1).double() for _ in range(4)))
    assert [float(penalties([by_stage], tokens, CreditContext(stage=s))) for s in ("rising", "plateau")] == [-0.1, -0.2]
    with pytest.raises(ValueError, match="either scheduled or adapted to a target, not both"):
        EntropyBonus(Schedule("linear", 1.0, 0.0, 4), target=0.2)
    with pytest.raises(ValueError, match="coefficient and delta must be >= 0"):
        EntropyBonus(Schedule("linear", 1.0, -0.5, 4))


def test_the_controller_by_hand() -> None:
    """c_0 acts in the first phase already; above the target nothing acts, and c falls, but not below 0."""
    callback = EntropyBonus(0.01, target=0.2, delta=0.005)
    assert run(callback, [0.1, 0.19, 0.3, 0.1]) == pytest.approx([0.01, 0.015, 0.0, 0.015])
    assert run(callback, [0.5] * 9 + [0.1, 0.1]) == pytest.approx([0.0] * 10 + [0.005])
    assert bonus(callback, torch.ones(2).double()).tolist() == pytest.approx([-0.005] * 2)
    assert run(EntropyBonus(0.0, target=1.0, delta=0.4), [0.5] * 5) == pytest.approx([0.0, 0.4, 0.8, 1.0, 1.0])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.floats(0, 1, width=32), max_size=12), st.floats(0, 1), st.floats(0, 0.2), st.integers(0, 12))
def test_against_a_transcription_and_across_a_checkpoint(
    entropies: list[float], start: float, delta: float, cut: int
) -> None:
    """c_k 1[H_k <= .4], then c_{k+1} = c_k +- delta; a run that was stopped anywhere goes on as if it had not."""
    wanted, c = [], start
    for entropy in entropies:
        wanted.append(c if entropy <= 0.4 else 0.0)
        c = min(1.0, max(0.0, c + (delta if entropy <= 0.4 else -delta)))
    assert run(EntropyBonus(start, 0.4, delta), entropies) == pytest.approx(wanted, abs=1e-12)
    stopped, resumed = EntropyBonus(start, 0.4, delta), EntropyBonus(start, 0.4, delta)
    before = run(stopped, entropies[:cut])
    resumed.load_state_dict(stopped.state_dict())
    assert before + run(resumed, entropies[cut:]) == run(EntropyBonus(start, 0.4, delta), entropies)


def test_the_mean_is_over_the_tokens_of_all_ranks() -> None:
    """.1 over three tokens and .5 over one make .2."""

    def rank(reduce: Any) -> float:
        ctx, rollout = CreditContext(reduce=reduce), build_rollout([[0.1] * 3] if reduce.rank else [[0.5]])
        run_chain([EntropyBonus(0.3, 0.2001)], rollout, full_credit(rollout), ctx)
        return ctx.metrics["credit/EntropyBonus/coefficient"]

    assert run_ranks(2, rank) == [0.3, 0.3]


def test_a_phase_without_tokens_changes_nothing() -> None:
    """Dynamic sampling may keep nothing."""
    callback = EntropyBonus(0.3, 0.2, 0.1)
    run(callback, [0.1])
    state = callback.state_dict()
    callback.observe(build_rollout([[0.1]]).rows(torch.tensor([]).long()), CreditContext())
    assert callback.state_dict() == state


def test_trls_controller_takes_the_same_steps() -> None:
    """TRL's own loss function, one optimiser step per phase; it applies c with the entropy of the step before."""
    args = SimpleNamespace(
        delta=None, use_bias_correction_kl=False, steps_per_generation=1, entropy_target=0.4, entropy_coef_delta=0.03,
        entropy_coef_min=0.0, entropy_coef_max=0.1,
    )  # fmt: skip
    trainer = SimpleNamespace(
        args=args, model=SimpleNamespace(training=True), loss_type="dapo", beta=0.0, epsilon_low=0.2, epsilon_high=0.28,
        accelerator=SimpleNamespace(
            num_processes=1, sync_gradients=True, gather=lambda x: x, reduce=lambda x, reduction: x
        ),
        importance_sampling_level="token", top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=False,
        max_completion_length=10, current_gradient_accumulation_steps=1, aux_loss_enabled=False,
        use_adaptive_entropy=True, entropy_coef=0.05, _entropy_bonus_enabled=True, _last_world_entropy=math.inf,
        _entropy_window_stats=None, _metrics={"train": defaultdict(list)},
    )  # fmt: skip
    compute = trl_function("trainer/grpo_trainer.py", "_compute_loss", nanmin=torch.min, nanmax=torch.max)
    ours = EntropyBonus(0.05, target=0.4, delta=0.03, largest=0.1)
    inputs = {
        "prompt_ids": torch.zeros(1, 1), "prompt_mask": torch.ones(1, 1), "completion_ids": torch.zeros(1, 3),
        "completion_mask": torch.tensor([[1.0, 1.0, 1.0]]), "advantages": torch.zeros(1),
        "num_items_in_batch": torch.tensor(3.0), "old_per_token_logps": torch.zeros(1, 3),
    }  # fmt: skip
    before = 0.0
    for entropy in (0.1, 0.3, 0.9, 0.2, 0.9, 0.9, 0.9, 0.9, 0.1, 0.3, 0.1, 0.1, 0.1, 0.1):
        entropies = torch.tensor([[entropy, entropy / 2, entropy * 1.5]])
        trainer._get_per_token_logps_and_entropies = lambda *a, h=entropies, **k: (torch.zeros(1, 3), h, None)
        loss = float(compute(trainer, None, inputs))
        assert loss == pytest.approx(-before * float(entropies.mean()), abs=1e-7)
        ours.observe(build_rollout(entropies.tolist()), CreditContext())
        assert ours.state_dict()["next"] == pytest.approx(trainer.entropy_coef, abs=1e-9)
        before = trainer.entropy_coef if entropies.mean() <= 0.4 else 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coefficient": -0.1}, "coefficient and delta must be >= 0, got -0.1 and 0.005"),
        ({"delta": -0.1}, "coefficient and delta must be >= 0, got 0.001 and -0.1"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EntropyBonus(**options)
