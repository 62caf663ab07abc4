"""The loop inside Lightning: gradients, skipped steps, determinism, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lit_rlvr_callbacks import EntropyTopK, PerplexityShaping
from runs import FLOAT32_NORMS, EvenTask, HopelessTask, tiny_module, tiny_trainer, train

from lit_rlvr import Batch, RLVRDataModule, Sampling
from lit_rlvr.advantages import GroupCentred
from lit_rlvr.aggregation import ConstantLength, SequenceMean
from lit_rlvr.engines import InProcessEngine
from lit_rlvr.kl import KLPenalty
from lit_rlvr.losses import ClippedSurrogate
from lit_rlvr.policy import load_policy
from lit_rlvr.shaping import DynamicSampling

ALGORITHMS: dict[str, dict[str, Any]] = {
    "dapo": {},
    "grpo": {"aggregation": SequenceMean(), "kl": KLPenalty(beta=0.5)},
    "dr_grpo": {"aggregation": ConstantLength(12), "advantage": GroupCentred()},
}


def sizes(micro_tokens: int, epochs: int = 1) -> Batch:
    return Batch(prompts=4, responses=4, minibatch_prompts=2, epochs=epochs, micro_tokens=micro_tokens)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_gradients_do_not_depend_on_the_token_budget(name: str) -> None:
    """One row at a time, some rows, all rows: the same gradients over two phases of two updates."""
    runs = [train(tiny_module(batch=sizes(b), **ALGORITHMS[name]), 4, EntropyTopK(0.5)) for b in (1, 60, 10**6)]
    assert len(runs[0].gradients) == 4
    assert max(g.abs().max() for g in runs[0].gradients[1].values()) > 1e-6
    for other in runs[1:]:
        for first, second in zip(runs[0].gradients, other.gradients, strict=True):
            for parameter in first:
                torch.testing.assert_close(first[parameter], second[parameter], **FLOAT32_NORMS)


def reference_gradient(module: Any, name: str) -> dict[str, torch.Tensor]:
    """The first mini-batch's gradient from full logits and the formula of the papers, one response at a time."""
    policy = load_policy(module.tokenizer.name_or_path, "float64")
    mini = module.phase.minibatches[0]
    facts, credit = mini.rollout, mini.credit
    rows = []
    for i in range(len(facts)):
        prompt = facts.prompt_ids[i][facts.prompt_mask[i]]
        response = facts.response_ids[i][facts.response_mask[i]]
        logits = policy.hf(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
        logp = logits.log_softmax(-1).gather(1, response[:, None])[:, 0]
        size, keep = len(response), credit.weight[i, : len(response)] > 0
        old = facts.old_logprobs[i, :size].double()
        ratio, a = (logp - old).exp(), credit.advantage[i, :size].double()
        surrogate = torch.minimum(ratio * a, ratio.clamp(0.8, 1.28) * a)
        rows.append((surrogate, keep, logp, old))
    selected = sum(int(keep.sum()) for _, keep, _, _ in rows)
    if name == "dapo":
        loss = -sum((s * keep).sum() for s, keep, _, _ in rows) / selected
    elif name == "dr_grpo":
        loss = -sum((s * keep).sum() for s, keep, _, _ in rows) / (12 * len(rows))
    else:
        share = sum(float(keep.sum()) / len(s) for s, keep, _, _ in rows)
        loss = -sum((s * keep).sum() / len(s) for s, keep, _, _ in rows) / share
        # At the first update policy and reference are equal, so k3 and its gradient are zero: nothing to add.
    loss.backward()
    return {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_gradient_equals_a_plain_transcription(name: str) -> None:
    """Selected head, micro-batches and denominators together against full logits in float64."""
    module = tiny_module(batch=sizes(60), **ALGORITHMS[name])
    recorder = train(module, 1, EntropyTopK(0.5))
    expected = reference_gradient(module, name)
    assert expected.keys() == recorder.gradients[0].keys()
    for parameter, gradient in recorder.gradients[0].items():
        # Old log-probabilities are kept in float32, so the ratio at the first update is 1 up to 6e-8, and so much of
        # a token's gradient (of order 1) is missing.
        torch.testing.assert_close(gradient, expected[parameter], rtol=1e-5, atol=1e-7)


def test_kl_in_the_loss_is_about_every_response_token() -> None:
    """With every token's weight at 0 the KL term alone still moves the policy, once it has left the reference."""
    module = tiny_module(kl=KLPenalty(beta=1.0), batch=sizes(10**6, epochs=2))
    recorder = train(module, 4)
    assert recorder.metrics[0]["train/kl_ref"] == pytest.approx(0.0, abs=1e-9)
    assert recorder.metrics[2]["train/kl_ref"] > 1e-8
    hopeless = tiny_module(kl=KLPenalty(beta=1.0))
    train(hopeless, 2, task=HopelessTask())
    assert hopeless.skipped_steps == 0


def test_kl_in_the_reward_lowers_it() -> None:
    module = tiny_module(kl=KLPenalty(beta=1.0, estimator="k2", where="reward"))
    metrics = train(module, 4).metrics
    assert metrics[0]["rollout/shaped_reward"] == pytest.approx(metrics[0]["rollout/reward"], abs=1e-6)
    assert metrics[2]["rollout/shaped_reward"] < metrics[2]["rollout/reward"]


@pytest.mark.parametrize("filtered", [False, True])
def test_a_mini_batch_without_learning_tokens_changes_nothing(filtered: bool) -> None:
    """Weight decay and momentum must not move the weights; the skipped steps are counted."""
    module = tiny_module(dynamic_sampling=DynamicSampling(2) if filtered else None)
    recorder = train(module, 4, task=HopelessTask())
    before = load_policy(module.tokenizer.name_or_path, "float64")
    if filtered:
        assert module.skipped_steps == 4
        assert recorder.metrics[2]["rollout/rounds"] == 2
        for old, new in zip(before.parameters(), module.policy.parameters(), strict=True):
            assert torch.equal(old, new)
    else:
        assert module.skipped_steps == 0
        assert all(g.abs().max() == 0 for step in recorder.gradients for g in step.values())


def test_two_runs_are_bit_identical() -> None:
    first, second = (tiny_module(dtype="float32", seed=3) for _ in range(2))
    train(first, 4, EntropyTopK(0.2))
    train(second, 4, EntropyTopK(0.2))
    other = tiny_module(dtype="float32", seed=4)
    train(other, 4, EntropyTopK(0.2))
    pairs = list(zip(first.policy.parameters(), second.policy.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not all(torch.equal(a, b) for a, b in zip(first.policy.parameters(), other.policy.parameters(), strict=True))


def test_clipping_by_norm_is_the_trainers() -> None:
    """The recorded gradients are clipped by Lightning after the last backward pass, to the norm asked for."""
    moved: list[float] = []

    class Norm(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            out = super().step(closure)
            gradients = [p.grad for group in self.param_groups for p in group["params"]]
            moved.append(float(torch.nn.utils.get_total_norm(gradients)))
            return out

    module = tiny_module(optimizer=lambda p: Norm(p, lr=1e-3), batch=sizes(20))
    train(module, 2, gradient_clip_val=0.01)
    assert moved == pytest.approx([0.01, 0.01], rel=1e-3)


class InexactEngine(InProcessEngine):
    """An engine whose log-probabilities must not be trusted."""

    def exact(self, precision: str) -> bool:
        return False

    def generate(self, *args: Any) -> Any:
        from dataclasses import replace

        out = super().generate(*args)
        return replace(out, logprobs=out.logprobs - 5.0, entropies=None)


@pytest.mark.parametrize("callback", [None, PerplexityShaping(0.3)])
@pytest.mark.parametrize("single_update", [True, False])
def test_an_inexact_engine_is_scored_again(callback: Any, single_update: bool) -> None:
    """With one update and nothing that reads them before, the training forward's own log-probabilities serve."""
    batch = Batch(prompts=4, responses=4, minibatch_prompts=4 if single_update else 2)
    chain = [callback] if callback else []
    exact = train(tiny_module(batch=batch), 2, *chain)
    inexact_module = tiny_module(batch=batch, engine=InexactEngine())
    inexact = train(inexact_module, 2, *chain)
    assert inexact_module.phase is not None
    assert inexact_module.phase.minibatches[0].own_old == (single_update and callback is None)
    for parameter, gradient in exact.gradients[0].items():
        # Engine and scoring pass agree to float32 (1e-7 relative in the ratio).
        torch.testing.assert_close(gradient, inexact.gradients[0][parameter], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampling": Sampling(temperature=0.0)}, "full distribution"),
        ({"sampling": Sampling(top_p=0.9)}, "full distribution"),
        ({"batch": Batch(prompts=2, responses=1)}, "at least 2 responses"),
        ({"reference": "somewhere"}, "nothing uses it"),
    ],
)
def test_contradictions_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_module(**options)


def test_trainer_options_that_break_the_loop_are_refused() -> None:
    data = RLVRDataModule(EvenTask())
    with pytest.raises(ValueError, match="accumulate_grad_batches must be 1"):
        tiny_trainer(2, [], accumulate_grad_batches=2).fit(tiny_module(), datamodule=data)
    with pytest.raises(ValueError, match="needs an RLVRDataModule"):
        tiny_trainer(2, []).fit(tiny_module(), train_dataloaders=[1])


def test_metrics_of_a_step() -> None:
    """The first update of a phase has ratio 1; the second has not; learning tokens are counted."""
    module = tiny_module(loss=ClippedSurrogate(0.0, 0.0), optimizer=lambda p: torch.optim.SGD(p, lr=1.0))
    recorder = train(module, 2, EntropyTopK(0.5))
    first, second = recorder.metrics
    assert first["train/ratio"] == pytest.approx(1.0, abs=1e-6)
    assert abs(second["train/ratio_max"] - 1.0) > 1e-4
    # With both clip distances 0 every token that moved the wrong way round 1 is clipped.
    assert second["train/clip_low"] + second["train/clip_high"] > 0.05
    assert module.phase is not None
    kept = [mini.credit for mini in module.phase.minibatches]
    learning = [float(((c.weight > 0) & (c.advantage != 0)).sum()) for c in kept]
    assert [first["train/tokens"], second["train/tokens"]] == learning


def test_rows_that_are_left_out_are_counted() -> None:
    """Rows none of whose tokens learn, and the share of padding where rows are padded."""
    for layout in ("padded", "shared"):
        module = tiny_module(batch=Batch(prompts=4, responses=4, minibatch_prompts=2, layout=layout))
        first, second = train(module, 2, EntropyTopK(0.1)).metrics
        assert module.phase is not None
        skipped = [float((~mini.credit.learns.any(-1)).sum()) for mini in module.phase.minibatches]
        assert [first["train/skipped_rows"], second["train/skipped_rows"]] == skipped
        assert sum(skipped) > 0
        assert (first["train/padding"] + second["train/padding"] > 0) is (layout == "padded")


def test_old_log_probabilities_are_those_of_mixed_precision() -> None:
    """With weights that stay as they are, a second step's ratio is 1: scoring rounds as training does."""
    sizes = Batch(prompts=8, responses=4, minibatch_prompts=4)
    module = tiny_module(dtype="float32", optimizer=lambda p: torch.optim.SGD(p, lr=0.0), batch=sizes)
    metrics = train(module, 2, EntropyTopK(rho=1.0), precision="bf16-mixed").metrics[1]
    # Which rows are multiplied together may change the last bit of a float32 sum; bfloat16 changes the third digit.
    assert metrics["train/ratio_max"] == pytest.approx(1, abs=1e-5)
    assert metrics["train/ratio_min"] == pytest.approx(1, abs=1e-5)
