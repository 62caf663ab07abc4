"""pass@k and maj@n against brute force, and the numbers of one evaluation by hand."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_rlvr.engines import Generation, Sampling
from lit_rlvr.evaluate import Evaluator
from lit_rlvr.metrics import EvaluationMetrics, maj_at_n, pass_at_k
from lit_rlvr.reduce import LocalReduce
from lit_rlvr.settings import Evaluation
from lit_rlvr.tasks import Prompt, Score
from lit_rlvr.types import EncodedPrompt


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_against_all_subsets(n: int) -> None:
    """The share of subsets of k responses in which one is right."""
    for right in range(n + 1):
        outcomes = [True] * right + [False] * (n - right)
        for k in range(1, n + 1):
            subsets = list(itertools.combinations(outcomes, k))
            assert pass_at_k(right, n, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_pass_at_k_of_many_responses() -> None:
    """No overflow: 1 - (1/2)(99/199)(98/198)... of 100 right ones in 200."""
    product = math.prod((100 - i) / (200 - i) for i in range(50))
    assert pass_at_k(100, 200, 50) == pytest.approx(1 - product)


def votes(answers: Sequence[str | None], right: str) -> list[Score]:
    """One score per answer."""
    return [Score(float(a == right), a == right, a) for a in answers]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(["1", "2", "3", None]), min_size=1, max_size=6))
def test_maj_at_n_against_random_tie_breaking(answers: list[str | None]) -> None:
    """Shuffle the responses in every way, and take the answer with most votes that comes first."""
    wins = []
    for order in itertools.permutations(answers):
        given_answers = [a for a in order if a is not None]
        counts = Counter(given_answers)
        best = max(given_answers, key=lambda a: counts[a], default=None)
        wins.append(best == "1")
    assert maj_at_n(votes(answers, "1")) == pytest.approx(sum(wins) / len(wins))


@pytest.mark.parametrize(
    ("answers", "share"),
    [(["1", "2", "2"], 0.0), (["1", "1", "2"], 1.0), (["1", "2", None, None], 0.5), ([None, None], 0.0),
     (["1", "2", "3"], 1 / 3)],
)  # fmt: skip
def test_maj_at_n_by_hand(answers: list[str | None], share: float) -> None:
    """No answer has no vote; ties are shared."""
    assert maj_at_n(votes(answers, "1")) == pytest.approx(share)


def test_verdicts_that_disagree_about_one_answer_are_averaged() -> None:
    """A verifier may time out on the third of three equal answers."""
    scores = [Score(1, True, "7"), Score(1, True, "7"), Score(0, False, "7"), Score(1, True, "8")]
    assert maj_at_n(scores) == pytest.approx(2 / 3)


def generation(lengths: list[int], truncated: list[bool], entropies: bool = True) -> Generation:
    """Responses of these lengths; token t of row b has the entropy b + t / 10, and padding a number out of place."""
    width = max(lengths)
    mask = torch.arange(width)[None, :] < torch.tensor(lengths)[:, None]
    entropy = torch.arange(len(lengths))[:, None] + torch.arange(width)[None, :] / 10
    entropy = torch.where(mask, entropy, 99.0)
    nothing = torch.zeros(len(lengths), width)
    return Generation(nothing.long(), mask, nothing, entropy if entropies else None, torch.tensor(truncated))


def test_an_evaluation_by_hand() -> None:
    """Three prompts of two responses, in two updates: 2, 1 and 0 of them right."""
    metrics = EvaluationMetrics(2, [1, 2])
    first = [Score(1, True, "a"), Score(1, True, "a"), Score(0.5, False, "b"), Score(1, True, "c")]
    metrics.update(first, generation([3, 1, 2, 2], [False, True, False, False]))
    metrics.update([Score(0, False), Score(0, False, "d")], generation([1, 3], [True, True]))
    assert metrics.compute() == pytest.approx(
        {
            "mean_at_2": (1 + 0.5 + 0) / 3,
            "pass_at_1": (1 + 0.5 + 0) / 3,
            "pass_at_2": (1 + 1 + 0) / 3,
            "maj_at_2": (1 + 0.5 + 0) / 3,
            "length": 12 / 6,
            "truncated": 3 / 6,
            # Rows 0, .1, .2 | 1 | 2, 2.1 | 3, 3.1 and 0 | 1, 1.1, 1.2
            "entropy": (0.3 + 1 + 4.1 + 6.1 + 0 + 3.3) / 12,
        }
    )


def test_compute_starts_afresh() -> None:
    """The second evaluation does not remember the first."""
    metrics = EvaluationMetrics(1, [1])
    metrics.update([Score(1, True, "a")], generation([5], [True]))
    assert metrics.compute()["mean_at_1"] == 1
    metrics.update([Score(0, False, "a")], generation([2], [False]))
    wanted = {"mean_at_1": 0, "pass_at_1": 0, "length": 2, "truncated": 0, "entropy": 0.05}
    assert metrics.compute() == pytest.approx(wanted)


def test_metrics_without_numbers_are_left_out() -> None:
    """An engine without entropies; one response has no majority."""
    metrics = EvaluationMetrics(1, [])
    metrics.update([Score(1, True, "a")], generation([2], [False], entropies=False))
    assert sorted(metrics.compute()) == ["length", "mean_at_1", "truncated"]


@pytest.mark.parametrize("k", [3, 0, -1])
def test_a_k_that_the_samples_do_not_allow_is_refused(k: int) -> None:
    """pass@3 of two responses is not defined."""
    with pytest.raises(ValueError, match=f"pass@{k} needs 1 <= k <= samples, and there are 2 samples per prompt"):
        EvaluationMetrics(2, [1, k])


def test_an_evaluation_is_as_long_as_training_unless_it_says_otherwise() -> None:
    """The engine is asked for responses of that length."""
    asked: list[Sampling] = []

    def generate(policy: Any, tokenizer: Any, tokens: Any, uid: Any, sampling: Sampling, seed: int) -> Any:
        asked.append(sampling)
        raise InterruptedError

    module: Any = SimpleNamespace(
        engine=SimpleNamespace(generate=generate, sync=lambda *_: None),
        trainer=SimpleNamespace(global_step=0),
        ahead=None,
        reduce=LocalReduce(),
        sampling=Sampling(max_new_tokens=7),
        policy=None,
        tokenizer=None,
        seed=0,
    )
    for evaluation in (Evaluation(top_k=3), Evaluation(temperature=0, max_new_tokens=9, stop=["."])):
        with pytest.raises(InterruptedError):
            Evaluator({"way": evaluation}).update(module, [EncodedPrompt(Prompt(0, "1+1?"), (1, 2))])
    assert asked == [Sampling(max_new_tokens=7, top_k=3), Sampling(temperature=0, max_new_tokens=9, stop=["."])]
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
        Evaluation(max_new_tokens=0)
