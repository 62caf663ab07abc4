"""The tasks that come with the package, and how their short names are resolved."""

from __future__ import annotations

import pickle
import random
import re
import subprocess
import sys
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_rlvr.tasks import LastDigitArithmetic, Prompt, ReasoningGym, Score, Split, Task, resolve_task
from lit_rlvr.tasks.last_digit import ALPHABET, SIZES, evaluate, parse

TASK = LastDigitArithmetic()
SPLITS: list[Split] = ["train", "val", "test"]


def left_to_right(question: str) -> int:
    """The value modulo 10 of an expression without precedence, with Python's arithmetic."""
    value = int(question[0])
    for operator, digit in zip(question[1:-1:2], question[2:-1:2], strict=True):
        value = eval(f"{value}{operator}{digit}")
    return value % 10


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=7), st.data())
def test_evaluate_against_python(digits: list[int], data: st.DataObject) -> None:
    """Any number of terms and of products; both readings, and the arguments stay."""
    operators = data.draw(st.lists(st.sampled_from("+-*"), min_size=len(digits) - 1, max_size=len(digits) - 1))
    text = "".join(f"{d}{o}" for d, o in zip(digits, [*operators, "?"], strict=True))
    assert parse(text) == (digits, operators)
    before = (list(digits), list(operators))
    assert evaluate(digits, operators) == eval(text[:-1]) % 10
    assert evaluate(digits, operators, precedence=False) == left_to_right(text)
    assert (digits, operators) == before


@pytest.mark.parametrize("split", SPLITS)
def test_every_problem_is_one_where_precedence_matters(split: Split) -> None:
    """Three or four digits, at most two products, and the reference answer is Python's."""
    prompts = TASK.prompts(split)
    assert [p.index for p in prompts] == list(range(SIZES[split]))
    for prompt in prompts[:2000]:
        assert re.fullmatch(r"\d([+*-]\d){2,3}\?", prompt.question)
        assert prompt.question.count("*") <= 2
        assert prompt.answer == str(eval(prompt.question[:-1]) % 10)
        assert int(prompt.answer) != left_to_right(prompt.question)
        assert set(prompt.question) <= set(ALPHABET)


def test_held_out_questions_stand_nowhere_else() -> None:
    """Neither in training nor in the other held-out split, nor twice in their own."""
    train, val, test = ([p.question for p in TASK.prompts(split)] for split in SPLITS)
    assert len(set(val)) == len(val)
    assert len(set(test)) == len(test)
    assert not set(val) & set(test)
    assert not set(train) & {*val, *test}


def test_problems_are_a_function_of_the_seed() -> None:
    """Equal in a fresh object, different under another seed."""
    assert LastDigitArithmetic(0).prompts("val") == TASK.prompts("val")
    assert LastDigitArithmetic(1).prompts("val") != TASK.prompts("val")


def demonstrations() -> list[tuple[Prompt, str]]:
    """3000 problems with what the demonstrator says."""
    rng = random.Random(0)
    return [(prompt, TASK.demonstrate(prompt, rng)) for prompt in TASK.prompts("train")[:3000]]


def test_the_demonstrator_is_right_a_third_of_the_time() -> None:
    """36.6 % was measured; the standard error of 3000 is .9 %. A warm start can use what it says."""
    shown = demonstrations()
    assert 0.33 < sum(TASK.score(*pair).correct for pair in shown) / len(shown) < 0.40
    assert all(set(text) <= set(ALPHABET) and len(text) <= 33 for _, text in shown)


def test_every_demonstrated_step_is_arithmetically_right() -> None:
    """Wrong are only the choices of the step: each line is the one before with one operation done."""
    for prompt, text in demonstrations()[:500]:
        current = prompt.question[:-1]
        body, answer = text.split("#")
        for line in body.split("|"):
            assert re.sub(r"\((.*?)=\d\)", r"\1", line) == current, text
            (step,) = re.findall(r"\((\d[+*-]\d)=(\d)\)", line)
            assert eval(step[0]) % 10 == int(step[1]), text
            current = re.sub(r"\(.*?=(\d)\)", r"\1", line)
        assert answer == current, text


@pytest.mark.parametrize(
    ("response", "answer", "correct"),
    [
        ("2+(1*8=8)|(2+8=0)#0", "0", True),
        ("#0", "0", True),
        ("nonsense#0", "0", True),
        ("0", None, False),
        ("", None, False),
        ("#0#0", None, False),
        ("##0", None, False),
        ("#1", "1", False),
        ("#", None, False),
        ("#0 ", "0 ", False),
        ("#00", "00", False),
        ("#0|2", "0|2", False),
        ("0#", None, False),
    ],
)
def test_score_of_last_digit(response: str, answer: str | None, correct: bool) -> None:
    """Exactly one ``#``, and after it the answer and nothing else."""
    assert TASK.score(Prompt(0, "2+1*8?", "0"), response) == Score(float(correct), correct, answer)


@pytest.mark.parametrize("dataset", ["chain_sum", "gcd"])
def test_reasoning_gym(dataset: str) -> None:
    """The reference answer between tags is right; without tags, or another number, it is not."""
    task = ReasoningGym(dataset, train_size=6, val_size=3, seed=2)
    for split in SPLITS:
        prompts = task.prompts(split)
        assert len(prompts) == (6 if split == "train" else 3)
        assert prompts == ReasoningGym(dataset, train_size=6, val_size=3, seed=2).prompts(split)
        for prompt in prompts:
            assert prompt.answer is not None
            assert prompt.question.endswith("\nGive the final answer between <answer> and </answer>.")
            right = task.score(prompt, f"so <answer>9</answer>, no: <answer> {prompt.answer} </answer>.")
            assert right == Score(1.0, True, prompt.answer)
            assert task.score(prompt, prompt.answer) == Score(0.0, False, None)
            wrong = str(int(prompt.answer) + 1)
            assert task.score(prompt, f"<answer>{wrong}</answer>") == Score(0.0, False, wrong)


def test_partial_credit_is_no_credit() -> None:
    """reasoning_gym pays a share for an answer that merely contains the right one."""
    task = ReasoningGym("spell_backward", train_size=1, val_size=1)
    (prompt,) = task.prompts("train")
    assert prompt.answer is not None
    almost = prompt.answer[:-1] + "#"
    dataset = task._sets["train"]
    assert 0 < dataset.score_answer(almost, dataset[0]) < 1
    assert task.score(prompt, f"<answer>{almost}</answer>") == Score(0.0, False, almost)


@pytest.mark.parametrize("seed", [0, 7])
def test_held_out_problems_of_reasoning_gym_are_not_training_problems(seed: int) -> None:
    """reasoning_gym makes problem i of seed s from s + i, so neighbouring seeds share all problems but one."""
    task = ReasoningGym("chain_sum", train_size=60, val_size=20, seed=seed, config={"min_terms": 5, "min_digits": 4})
    train, val, test = ({p.question for p in task.prompts(split)} for split in SPLITS)
    other = {p.question for p in ReasoningGym("chain_sum", 60, 20, seed + 1, task.config).prompts("train")}
    assert [len(s) for s in (train & val, train & test, val & test, train & other)] == [0, 0, 0, 0]


def test_options_of_the_dataset() -> None:
    """They reach it, and what it refuses is a sentence."""
    task = ReasoningGym("chain_sum", 4, 1, config={"min_terms": 2, "max_terms": 2}, instruction=" Go.")
    for prompt in task.prompts("train"):
        assert prompt.question.endswith(" Go.")
        assert len(re.findall(r" [+-] ", prompt.question)) == 1
    for config in ({"colour": 1}, {"min_terms": 9, "max_terms": 2}):
        with pytest.raises(ValueError, match="reasoning_gym refuses the options of 'chain_sum'"):
            ReasoningGym("chain_sum", 4, 1, config=config).prompts("val")


def test_reasoning_gym_travels_to_other_processes() -> None:
    """Before and after its problems were made."""
    task = ReasoningGym("chain_sum", 3, 2)
    fresh = pickle.loads(pickle.dumps(task))
    prompt = task.prompts("val")[1]
    assert prompt.answer is not None
    for copy in (fresh, pickle.loads(pickle.dumps(task))):
        assert copy.score(prompt, f"<answer>{prompt.answer}</answer>").correct


def test_unknown_datasets_and_sizes_are_refused() -> None:
    """With the nearest names."""
    with pytest.raises(ValueError, match=r"reasoning_gym has no dataset 'chain_sums'; did you mean .*chain_sum"):
        ReasoningGym("chain_sums")
    with pytest.raises(ValueError, match=r"reasoning_gym has no dataset '42'$"):
        ReasoningGym("42")
    with pytest.raises(ValueError, match="train_size and val_size must be at least 1"):
        ReasoningGym("chain_sum", train_size=0)


class Own(Task):
    """A task of the user."""

    def prompts(self, split: Split) -> Sequence[Prompt]:
        return [Prompt(0, "?")]

    def score(self, prompt: Prompt, response: str) -> Score:
        return Score(0.0, False)


def test_resolve_task() -> None:
    """Short names, and tasks as they are."""
    own = Own()
    assert resolve_task(own) is own
    assert resolve_task("last_digit_arithmetic") == TASK
    assert resolve_task("reasoning_gym:gcd") == ReasoningGym("gcd")
    with pytest.raises(ValueError, match="Own has no demonstrations, so it cannot be used for a warm start"):
        own.demonstrate(Prompt(0, "?"), random.Random(0))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("last_digit_arithmetics", "did you mean last_digit_arithmetic?"),
        ("last_digit_arithmetic:3", "there is no task 'last_digit_arithmetic:3'"),
        ("reasoning_gym", "did you mean reasoning_gym:NAME?"),
        ("ReasoningGyms", "did you mean ReasoningGym?"),
        ("aime", "known are last_digit_arithmetic, reasoning_gym:NAME, or a class_path"),
        ("reasoning_gym:gdc", "did you mean"),
    ],
)
def test_unknown_tasks_are_refused(name: str, message: str) -> None:
    """With the nearest name, or all of them."""
    with pytest.raises(ValueError, match=re.escape(message)):
        resolve_task(name)


def test_importing_tasks_does_not_import_torch() -> None:
    """Verifier processes start quickly."""
    code = "import sys, lit_rlvr.tasks, lit_rlvr.verify; print([m for m in ('torch', 'lightning') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert out.stdout.strip() == "[]"
