"""Held-out problems in several sets: their columns, their shares of an evaluation, and their metrics."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import CONFIGS, succeed
from hypothesis import given
from hypothesis import strategies as st

from lit_rlvr.data import first_of_each
from lit_rlvr.engines import Generation, Sampling
from lit_rlvr.evaluate import Evaluator
from lit_rlvr.reduce import LocalReduce
from lit_rlvr.rewards import ExactMatch
from lit_rlvr.settings import Evaluation
from lit_rlvr.tasks import ProblemFiles, ProblemSet, Prompt, Score
from lit_rlvr.tasks.columns import cell


def write(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """Training problems, and two held-out sets with columns of their own."""
    return {
        "train": write(tmp_path / "train.jsonl", [{"question": f"{i}+0?", "answer": str(i)} for i in range(5)]),
        "easy": write(tmp_path / "easy.jsonl", [{"problem": f"{i}+1?", "answer": str(i + 1)} for i in range(3)]),
        "hard": write(tmp_path / "hard.jsonl", [{"question": f"{i}*9?", "gold": [str(i * 9)]} for i in range(2)]),
    }


def task_of(files: Mapping[str, str], **options: Any) -> ProblemFiles:
    sets = {"easy": ProblemSet(files["easy"], question="problem"), "hard": ProblemSet(files["hard"], answer="gold.0")}
    return ProblemFiles(files["train"], {"right": ExactMatch()}, **{"val": sets, **options})


def test_every_set_has_its_columns_and_its_name(files: dict[str, str]) -> None:
    prompts = task_of(files).prompts("val")
    assert [(p.index, p.benchmark, p.question, p.answer) for p in prompts] == [
        (0, "easy", "0+1?", "1"), (1, "easy", "1+1?", "2"), (2, "easy", "2+1?", "3"),
        (3, "hard", "0*9?", "0"), (4, "hard", "1*9?", "9"),
    ]  # fmt: skip
    assert {p.benchmark for p in task_of(files).prompts("train")} == {None}


def test_test_problems_may_have_sets_too(files: dict[str, str]) -> None:
    task = task_of(files, val=None, test={"easy": ProblemSet(files["easy"], question="problem")})
    assert [p.benchmark for p in task.prompts("test")] == ["easy"] * 3


def test_a_warm_start_does_not_depend_on_held_out_sets(files: dict[str, str]) -> None:
    """It imitates training problems alone; a set that is not there is refused all the same."""
    before = task_of(files).demonstration_facts()
    Path(files["hard"]).write_text('{"question": "1?", "gold": ["1"]}\n')
    assert task_of(files).demonstration_facts() == before
    with pytest.raises(ValueError, match="no file"):
        task_of({**files, "hard": "nothing.jsonl"})


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"val": {}}, "ProblemFiles has held-out sets, but none is named"),
        ({"val": {"a b": ProblemSet("x.jsonl")}}, "the held-out set 'a b' has more than letters, digits, _ and -"),
        ({"question_pattern": "("}, "question_pattern is no regular expression"),
        ({"question_pattern": "User:.*"}, "question_pattern needs a group"),
    ],
)
def test_what_cannot_work_is_refused(files: dict[str, str], options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        task_of(files, **options)


def test_a_column_that_a_set_lacks_is_named(files: dict[str, str]) -> None:
    task = task_of(files, val={"hard": ProblemSet(files["hard"], question="prolbem")})
    with pytest.raises(ValueError, match="no column 'prolbem'"):
        task.prompts("val")


def test_a_pattern_finds_the_question_of_training_problems_alone(tmp_path: Path) -> None:
    rows = [{"question": "User: 1\n+1?\nAssistant:", "answer": 2}, {"question": "Hello", "answer": 3}]
    train, val = write(tmp_path / "t.jsonl", rows), write(tmp_path / "v.jsonl", [{"question": "2+2?", "answer": 4}])
    task = ProblemFiles(train, {"right": ExactMatch()}, val=val, question_pattern=r"User:\s*(.*\S)\s*Assistant:")
    assert [p.question for p in task.prompts("train")] == ["1\n+1?"]
    assert [p.question for p in task.prompts("val")] == ["2+2?"]


def test_dots_reach_into_nested_columns() -> None:
    values = {"a": [{"b": "x"}], "c.d": "plain"}
    assert (cell(values, "a.0.b"), cell(values, "c.d")) == ("x", "plain")
    for column in ("a.1.b", "a.b", "a.0.b.c", "z"):
        with pytest.raises(ValueError, match=f"no column '{column}'"):
            cell(values, column)


@given(st.lists(st.sampled_from(["x", "y", None]), max_size=12), st.integers(1, 5))
def test_eval_prompts_counts_in_each_set(names: list[str | None], most: int) -> None:
    prompts = [Prompt(i, "?", benchmark=name) for i, name in enumerate(names)]
    kept = first_of_each(prompts, most)
    for name in ("x", "y", None):
        of_set = [p for p in prompts if p.benchmark == name]
        assert [p for p in kept if p.benchmark == name] == of_set[:most]
    assert [p.index for p in kept] == sorted(p.index for p in kept)
    assert first_of_each(prompts, None) == prompts


class Fixed:
    """An engine and verifier with fixed answers: whether sample s of prompt i is right."""

    def __init__(self, right: dict[int, list[bool]]) -> None:
        self.right = right
        self.model: Any = None

    def sync(self, *_: Any) -> None:
        """Nothing: there are no weights."""

    def generate(self, policy: Any, tokenizer: Any, prompts: Any, uid: torch.Tensor, *_: Any) -> Generation:
        self.uid = uid.tolist()
        length = torch.tensor([1 + prompt for _, prompt, _ in self.uid])
        mask = torch.arange(8) < length[:, None]
        zeros = torch.zeros(len(uid), 8)
        return Generation(zeros.long(), mask, zeros, zeros + length[:, None], torch.zeros(len(uid), dtype=torch.bool))

    def __call__(self, prompts: Any, texts: Any) -> Any:
        scores = [Score(0.0, self.right[prompt][sample], "a") for _, prompt, sample in self.uid]
        return type("Verdicts", (), {"scores": scores})

    def batch_decode(self, rows: Any, skip_special_tokens: bool) -> list[str]:
        return ["" for _ in rows]


def test_each_set_is_reported_and_their_mean_weighs_sets_alike() -> None:
    """Three prompts of one set and one of the other, in two batches, by hand."""
    fixed = Fixed({0: [True, True], 1: [True, False], 2: [False, False], 3: [True, True]})
    names = ["easy", "easy", "easy", "hard"]
    prompts: Any = [
        type("Encoded", (), {"prompt": Prompt(i, "?", benchmark=n), "tokens": (1,)}) for i, n in enumerate(names)
    ]
    data = type("Data", (), {"verifier": fixed})
    facts = {"engine": fixed, "policy": None, "tokenizer": fixed, "seed": 0, "data": data, "reduce": LocalReduce()}
    facts |= {"sampling": Sampling(), "ahead": None}
    module: Any = type("Module", (), {**facts, "trainer": type("Trainer", (), {"global_step": 0})})
    evaluator = Evaluator({"way": Evaluation(samples=2)})
    for _ in range(2):  # the second evaluation begins afresh
        for batch in (prompts[:1], prompts[1:]):
            evaluator.prepare(["easy", "hard"], torch.device("cpu"))
            evaluator.update(module, batch)
        out = evaluator.finish(7)
        assert out["way/easy/mean_at_2"] == 0.5
        assert out["way/hard/mean_at_2"] == 1.0
        assert out["way/mean_at_2"] == 0.75
        assert out["way/easy/pass_at_2"] == pytest.approx(2 / 3)
        assert (out["way/easy/length"], out["way/hard/length"], out["way/length"]) == (2.0, 4.0, 3.0)
        assert {name.rpartition("/")[0] for name in out} == {"way", "way/easy", "way/hard"}
    evaluator.prepare([], torch.device("cpu"))
    fixed.right = {0: [True, False]}
    evaluator.update(module, [type("Encoded", (), {"prompt": Prompt(0, "?"), "tokens": (1,)})])
    assert evaluator.finish(8)["way/mean_at_2"] == 0.5


def test_sets_in_yaml_are_evaluated_from_end_to_end(files: dict[str, str], tmp_path: Path) -> None:
    """Paths start at the YAML file; two held-out prompts of each set are used."""
    (tmp_path / "task.yaml").write_text(
        "data:\n  eval_prompts: 2\n  task:\n    class_path: ProblemFiles\n    init_args:\n      train: train.jsonl\n"
        "      rewards: {right: ExactMatch}\n      val:\n        easy: {path: easy.jsonl, question: problem}\n"
        "        hard: {path: hard.jsonl, answer: gold.0}\n"
    )
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    layers = ("--config", str(CONFIGS / "quickstart.yaml"), "--config", str(tmp_path / "task.yaml"))
    done = succeed(folder, "explain", *layers, "--trainer.logger=false")
    assert "sampled: 1 response(s) of at most 34 tokens to 4 problems" in done.out
    assert "reported for each set and as their mean: easy 2, hard 2" in done.out
    done = succeed(folder, "validate", *layers, "--trainer.logger=false", "--model.sampling.max_new_tokens=4")
    for name in ("sampled", "sampled/easy", "sampled/hard", "greedy/hard"):
        assert f"{name}/mean_at_1 " in done.out + done.err
