"""The supervised warm start: what it learns from, how fast, and when the cache takes its place."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from command_line import FewSums, saved_weights
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_rlvr import Template, Warmup
from lit_rlvr.models import resolve_model
from lit_rlvr.tasks import LastDigitArithmetic, Prompt, Task
from lit_rlvr.warmup import Demonstrations, WarmupModule

TINY = "builtin:tiny-qwen3-75k"
SHORT = Warmup(steps=6, batch_size=4, lr_warmup=2)
TASK = FewSums()


@dataclass(frozen=True)
class Silent(FewSums):
    """A task that shows nothing."""

    def demonstrate(self, prompt: Prompt, rng: random.Random) -> str:
        return Task.demonstrate(self, prompt, rng)


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[Warmup]:
    """The warm starts that were trained rather than taken from the cache."""
    seen: list[Warmup] = []
    train = Warmup._train

    def counted(self: Warmup, *arguments: Any) -> None:
        seen.append(self)
        train(self, *arguments)

    monkeypatch.setattr(Warmup, "_train", counted)
    return seen


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache."""
    monkeypatch.setenv("LIT_RLVR_CACHE", str(tmp_path))


def test_the_second_call_trains_nothing(trainings: list[Warmup]) -> None:
    folder = SHORT.run(TINY, TASK)
    weights = saved_weights(folder)
    assert Warmup(steps=6, batch_size=4, lr_warmup=2).run(TINY, FewSums()) == folder
    assert trainings == [SHORT]
    assert all(torch.equal(value, weights[name]) for name, value in saved_weights(folder).items())


def test_other_settings_have_a_folder_of_their_own() -> None:
    """Everything that shapes the weights is in the hash."""
    plain = SHORT.fingerprint(TINY, TASK, Template(), "float32")
    changes: list[dict[str, Any]] = [{"lr": 1e-3}, {"steps": 7}, {"batch_size": 5}, {"lr_warmup": 1}, {"seed": 1}]
    others = [
        *(replace(SHORT, **change).fingerprint(TINY, TASK, Template(), "float32") for change in changes),
        replace(SHORT, weight_decay=0.0).fingerprint(TINY, TASK, Template(), "float32"),
        SHORT.fingerprint(TINY, FewSums(seed=1), Template(), "float32"),
        SHORT.fingerprint(TINY, LastDigitArithmetic(), Template(), "float32"),
        SHORT.fingerprint(TINY, TASK, Template(text="{question}|"), "float32"),
        SHORT.fingerprint(TINY, TASK, Template(), "float64"),
        SHORT.fingerprint("other", TASK, Template(), "float32"),
    ]
    assert len({plain, *others}) == 12


def test_another_learning_rate_is_trained(trainings: list[Warmup]) -> None:
    """Its folder is another, and so are its weights."""
    other = replace(SHORT, lr=1e-3)
    first, second = SHORT.run(TINY, TASK), other.run(TINY, TASK)
    assert trainings == [SHORT, other]
    assert first != second
    assert not torch.equal(*(saved_weights(f)["model.embed_tokens.weight"] for f in (first, second)))


def test_training_that_was_cut_short_starts_again(trainings: list[Warmup]) -> None:
    folder = SHORT.run(TINY, TASK)
    (folder / "done").unlink()
    SHORT.run(TINY, TASK)
    assert trainings == [SHORT, SHORT]


def test_the_same_settings_give_the_same_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In another cache, after other random numbers."""
    first = saved_weights(SHORT.run(TINY, TASK))
    monkeypatch.setenv("LIT_RLVR_CACHE", str(tmp_path / "other"))
    torch.manual_seed(5)
    random.seed(5)
    second = saved_weights(SHORT.run(TINY, TASK))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_demonstrations_become_more_likely() -> None:
    """The folder opens with transformers; its loss on demonstrations, padding left out, is well below the start's."""
    warm = Warmup(steps=40, batch_size=8, lr_warmup=5).run(TINY, TASK)
    tokenizer = AutoTokenizer.from_pretrained(warm)
    batch = next(iter(Demonstrations(SHORT, TASK, Template(), tokenizer)))
    ids = torch.cat([batch.prompt_ids, batch.response_ids], 1)
    assert bool(batch.prompt_mask.all() & batch.response_mask.all())  # this task's texts have one length

    @torch.no_grad()
    def loss(folder: str | Path) -> float:
        logits = AutoModelForCausalLM.from_pretrained(folder)(ids).logits[:, batch.prompt_ids.shape[1] - 1 : -1]
        return float(cross_entropy(logits.flatten(0, 1).double(), batch.response_ids.flatten()))

    # The digit is drawn from ten: a third of the response's nats cannot be learnt, ln(10) / 3 = 0.77.
    assert loss(resolve_model(TINY)) > 2.5
    assert 0.6 < loss(warm) < 1.2


def test_the_first_step_follows_the_mean_over_tokens() -> None:
    """Cross-entropy over response tokens of all rows, prompts and padding left out; ragged demonstrations."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(TINY))
    batch = next(iter(Demonstrations(SHORT, LastDigitArithmetic(), Template(), tokenizer)))
    assert len(set(batch.lengths.tolist())) > 1
    module = WarmupModule(SHORT, resolve_model(TINY), "float64")
    nats, tokens = torch.zeros((), dtype=torch.float64), 0
    for row in range(len(batch)):
        prompt = batch.prompt_ids[row][batch.prompt_mask[row]]
        response = batch.response_ids[row][batch.response_mask[row]]
        logits = module.policy.hf(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
        nats, tokens = nats + cross_entropy(logits, response, reduction="sum"), tokens + len(response)
    torch.testing.assert_close(module.training_step(batch, 0), nats / tokens)


def test_demonstrations_end_with_the_end_token() -> None:
    """Each row is a question of the task and one whole answer to it."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(TINY))
    demonstrations = Demonstrations(SHORT, TASK, Template(), tokenizer)
    assert len(demonstrations) == 6
    batches = list(demonstrations)
    questions = [p.question for p in TASK.prompts("train")]
    assert len(batches) == 6
    asked = []
    for batch in batches:
        for row in range(4):
            response = batch.response_ids[row][batch.response_mask[row]].tolist()
            assert response.count(tokenizer.eos_token_id) == 1
            assert response[-1] == tokenizer.eos_token_id
            assert tokenizer.decode(response[:-1])[0] == "#"
            asked.append(tokenizer.decode(batch.prompt_ids[row][batch.prompt_mask[row]]))
    assert sorted(asked) == sorted(questions)  # 24 demonstrations are one epoch of the 24 problems
    assert asked != questions


def test_a_task_without_demonstrations_is_refused() -> None:
    with pytest.raises(ValueError, match="Silent has no demonstrations, so it cannot be used for a warm start"):
        SHORT.run(TINY, Silent())


def test_a_task_that_cannot_be_hashed_is_refused() -> None:
    class Plain(LastDigitArithmetic):
        """Not a dataclass of its own, yet one by inheritance."""

    class Bare(Task):
        """No dataclass at all."""

        def prompts(self, split: Any) -> list[Prompt]:
            return []

        def score(self, prompt: Prompt, response: str) -> Any:
            return None

    with pytest.raises(ValueError, match="Bare must be a dataclass to be used for a warm start"):
        SHORT.run(TINY, Bare())
    assert SHORT.fingerprint(TINY, Plain(), Template(), "float32") != SHORT.fingerprint(
        TINY, LastDigitArithmetic(), Template(), "float32"
    )


@pytest.mark.parametrize("step", [0, 1, 2, 4, 6])
def test_the_rate_follows_its_formula(step: int) -> None:
    """A line up to the peak, then a cosine down to a twentieth; the optimiser gets it times ``lr``."""
    expected = {0: 0.5, 1: 1.0, 2: 1.0, 4: 0.525, 6: 0.05}[step]
    assert SHORT.rate(step) == pytest.approx(expected)
    module = WarmupModule(SHORT, resolve_model(TINY), "float32")
    parts = module.configure_optimizers()
    for _ in range(step):
        parts["optimizer"].step()
        parts["lr_scheduler"]["scheduler"].step()
    assert parts["optimizer"].param_groups[0]["lr"] == pytest.approx(expected * SHORT.lr)
    assert parts["lr_scheduler"]["interval"] == "step"


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"steps": 0}, r"^warmup\.steps must be at least 1, got 0$"),
        ({"batch_size": 0}, r"^warmup\.batch_size must be at least 1, got 0$"),
        ({"lr": 0.0}, r"^warmup\.lr must be > 0, got 0\.0$"),
        ({"lr_warmup": -1}, r"^warmup\.lr_warmup must be at least 0, got -1$"),
        ({"weight_decay": -0.1}, r"^warmup\.weight_decay must be at least 0, got -0\.1$"),
        ({"steps": 20}, r"^warmup\.lr_warmup 30 is more than warmup\.steps 20; lower lr_warmup, .*lr_warmup=2$"),
    ],
)
def test_numbers_out_of_range_are_refused(wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Warmup(**wrong)


def test_the_callers_seed_and_modes_are_left_alone() -> None:
    """Weights come from the settings alone, so a warm start need not draw from the process's generator."""
    pl.seed_everything(1, verbose=False)
    expected = torch.rand(2)
    pl.seed_everything(1, verbose=False)
    SHORT.run(TINY, TASK)
    assert torch.equal(torch.rand(2), expected)
