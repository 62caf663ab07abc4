"""The user's own problem files: what becomes of every row, how rewards are combined, and what is refused."""

from __future__ import annotations

import json
import logging
import math
import pickle
import random
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from jsonargparse import ArgumentParser

from lit_rlvr.data import Template
from lit_rlvr.rewards import ExactMatch, Judgement, MathVerify, Reward
from lit_rlvr.tasks import ProblemFiles, Prompt, Score, Task
from lit_rlvr.tasks.files import held_out
from lit_rlvr.warmup import Warmup

RIGHT = {"right": ExactMatch()}


@dataclass(frozen=True)
class Length(Reward):
    """The length of the response; some responses make it fail."""

    weight: float = 1.0
    isolated = False

    def __call__(self, prompt: Prompt, response: str) -> Judgement:
        if response == "exit":
            raise SystemExit(3)
        return Judgement(math.nan if response == "nan" else 1 / (4 - len(response)), "length")


def write(folder: Path, rows: list[Any], name: str = "problems.jsonl") -> str:
    """Write rows as JSON lines; texts as they are."""
    path = folder / name
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def sums(count: int) -> list[dict[str, Any]]:
    """Different problems."""
    return [{"question": f"{i}+1?", "answer": i + 1, "solution": f"#{i + 1}", "level": i % 3} for i in range(count)]


def questions(task: ProblemFiles, split: Any) -> list[str]:
    """A split's questions."""
    return [prompt.question for prompt in task.prompts(split)]


def test_rows_become_prompts(tmp_path: Path) -> None:
    """Numbers are written out; only the columns asked for are kept, and the place of the row."""
    rows = [
        {"q": " 1+1? ", "a": 2, "level": 3, "more": 0},
        {"q": "x", "a": 0.5, "level": None},
        {"q": "y", "a": "1/2", "level": [1]},
    ]
    task = ProblemFiles(write(tmp_path, rows), RIGHT, question="q", answer="a", meta=["level"], val_share=0)
    assert task.prompts("train") == [
        Prompt(0, " 1+1? ", "2", {"level": 3, "source": "problems.jsonl:1"}),
        Prompt(1, "x", "0.5", {"level": None, "source": "problems.jsonl:2"}),
        Prompt(2, "y", "1/2", {"level": [1], "source": "problems.jsonl:3"}),
    ]
    alone = ProblemFiles(write(tmp_path, rows), {"length": Length()}, question="q", answer=None, val_share=0)
    assert [prompt.answer for prompt in alone.prompts("train")] == [None, None, None]


def test_rows_that_cannot_be_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Left out, counted, and the first five named with the reason; indices have no gap."""
    rows = [
        {"question": "a", "answer": "1"}, "{", {"question": " ", "answer": "1"}, {"question": 5, "answer": "1"},
        {"answer": "1"}, {"question": "b", "answer": None}, {"question": "c", "answer": True},
        {"question": "d", "answer": ""}, '{"question": "e", "answer": NaN}', {"question": "f", "answer": "2"},
    ]  # fmt: skip
    task = ProblemFiles(write(tmp_path, rows), RIGHT, val_share=0)
    with caplog.at_level(logging.WARNING, "lit_rlvr.tasks.files"):
        assert [(p.index, p.question) for p in task.prompts("train")] == [(0, "a"), (1, "f")]
        task.prompts("train")
    assert caplog.messages == [
        f"8 of 10 rows of {tmp_path}/problems.jsonl are left out: "
        "problems.jsonl:2: no valid JSON: Expecting property name enclosed in double quotes (character 2); "
        "problems.jsonl:3: column 'question' is empty; "
        "problems.jsonl:4: column 'question' is of type int, expected text; "
        "problems.jsonl:5: no column 'question'; "
        "problems.jsonl:6: column 'answer' is empty; ..."
    ]
    rest = ProblemFiles(write(tmp_path, [rows[0], *rows[6:9]], "rest.jsonl"), RIGHT, val_share=0)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "lit_rlvr.tasks.files"):
        rest.prompts("train")
    assert caplog.messages[0].endswith(
        "rest.jsonl:2: column 'answer' is of type bool, expected text or a finite number; "
        "rest.jsonl:3: column 'answer' is empty; "
        "rest.jsonl:4: column 'answer' is of type float, expected text or a finite number"
    )


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"question": "a", "anwser": "1"}], {}, "has no column 'answer'; did you mean anwser?"),
        ([{"x": 1, "y": 2}], {}, "has no column 'question'; it has 'x', 'y'"),
        ([{"question": "a", "answer": "1"}], {"solution": "answers"}, "has no column 'answers'; did you mean answer?"),
        ([{"question": "a", "answer": "1"}], {"meta": ["level"]}, "has no column 'level'; it has 'question', 'answer'"),
        ([], {}, "has no problem that can be used: it has no rows"),
        (["{"], {}, "has no problem that can be used: problems.jsonl:1: no valid JSON"),
        ([{"question": "", "answer": "1"}], {}, "has no problem that can be used: problems.jsonl:1: column 'question'"),
    ],
)
def test_files_without_a_good_row(tmp_path: Path, rows: list[Any], options: dict[str, Any], message: str) -> None:
    """One sentence that names the column or the row."""
    with pytest.raises(ValueError, match=re.escape(message)):
        ProblemFiles(write(tmp_path, rows), RIGHT, **options).prompts("train")


def test_held_out_problems(tmp_path: Path) -> None:
    """About the share, disjoint, the same for any order and after additions; another seed holds out others."""
    rows = sums(400)
    task = ProblemFiles(write(tmp_path, rows), RIGHT, val_share=0.2)
    train, val = questions(task, "train"), questions(task, "val")
    assert sorted(train + val) == sorted(row["question"] for row in rows)
    assert 50 < len(val) < 110  # 80 expected, with a standard deviation of 8
    assert [p.index for p in task.prompts("val")] == list(range(len(val)))
    assert all(p.meta["source"] == f"problems.jsonl:{int(p.question[:-3]) + 1}" for p in task.prompts("val"))
    more = ProblemFiles(write(tmp_path, [*sums(500)[::-1], *rows], "more.jsonl"), RIGHT, val_share=0.2)
    assert not set(questions(more, "train")) & set(val)
    assert not set(questions(more, "val")) & set(train)
    assert set(questions(ProblemFiles(task.train, RIGHT, val_share=0.2, seed=1), "val")) != set(val)
    wider = questions(ProblemFiles(task.train, RIGHT, val_share=0.5), "val")
    assert set(val) < set(wider)
    assert [held_out("1+1?", 0, share) for share in (0.0, 1.0)] == [False, True]


def test_a_file_for_every_split(tmp_path: Path) -> None:
    """Nothing is held out of training then, and held-out rows need no solution."""
    held = [{"question": "val?", "answer": "1"}]
    files = [write(tmp_path, rows, name) for rows, name in ((sums(9), "a.jsonl"), (held, "b.jsonl"), (held, "c.jsonl"))]
    task = ProblemFiles(files[0], RIGHT, val=files[1], test=files[2], solution="solution")
    assert len(task.prompts("train")) == 9
    assert task.prompts("val") == [Prompt(0, "val?", "1", {"source": "b.jsonl:1"})]
    assert task.prompts("test") == [Prompt(0, "val?", "1", {"source": "c.jsonl:1"})]


def test_splits_that_are_not_there(tmp_path: Path) -> None:
    """Said when they are asked for."""
    task = ProblemFiles(write(tmp_path, sums(3)), RIGHT, val_share=0)
    assert len(task.prompts("train")) == 3
    with pytest.raises(ValueError, match=r"ProblemFiles\.test is null, so there are no test problems; name a file"):
        task.prompts("test")
    with pytest.raises(ValueError, match=r"ProblemFiles\.val is null and val_share is 0, so there are no val problems"):
        task.prompts("val")
    for share, split in ((1e-9, "val"), (1 - 1e-9, "train")):
        with pytest.raises(ValueError, match=f"of the 3 problems of .* leaves none for {split}; change it, or name"):
            ProblemFiles(task.train, RIGHT, val_share=share).prompts("train")


def test_a_score_is_the_weighted_sum_of_rewards(tmp_path: Path) -> None:
    """Each reward unweighted in its parts; the outcome and the answer are those of one of them."""
    rewards: dict[str, Reward] = {"right": ExactMatch(weight=2.0), "length": Length(weight=-0.5)}
    file = write(tmp_path, sums(3))
    task = ProblemFiles(file, rewards)
    prompt = Prompt(0, "?", "42")
    assert task.reward_names == ("right", "length")
    assert task.score(prompt, "42") == Score(1.75, True, "42", {"right": 1.0, "length": 0.5})
    assert task.score(prompt, "1") == Score(-0.5 / 3, False, "1", {"right": 0.0, "length": 1 / 3})
    other = ProblemFiles(file, rewards, outcome="length", correct_at=0.5)
    assert other.score(prompt, "43") == Score(-0.25, True, "length", {"right": 0.0, "length": 0.5})
    assert other.score(prompt, "4").correct is False
    assert math.isnan(task.score(prompt, "nan").reward)


def test_a_reward_that_fails_is_named(tmp_path: Path) -> None:
    """Also one that calls exit; the cause is kept."""
    task = ProblemFiles(write(tmp_path, sums(3)), {"right": ExactMatch(), "own": Length()})
    with pytest.raises(RuntimeError, match=r"^reward 'own' raised ZeroDivisionError: division by zero$"):
        task.score(Prompt(0, "?", "1"), "four")
    with pytest.raises(RuntimeError, match=r"^reward 'own' raised SystemExit: 3$"):
        task.score(Prompt(0, "?", "1"), "exit")
    with pytest.raises(RuntimeError, match="reward 'right' raised ValueError: problem 0 has no reference answer"):
        task.score(Prompt(0, "?"), "1")


def test_isolation_is_decided_by_the_rewards(tmp_path: Path) -> None:
    """One that needs it is enough."""
    file = write(tmp_path, sums(3))
    assert ProblemFiles(file, RIGHT).isolated is False
    assert ProblemFiles(file, {**RIGHT, "maths": MathVerify()}).isolated is True


def test_solutions_are_demonstrations(tmp_path: Path) -> None:
    """The column's text; another file is another warm start, so that no cache serves old solutions."""
    file = write(tmp_path, sums(30))
    task = ProblemFiles(file, RIGHT, solution="solution")
    prompt = task.prompts("train")[0]
    assert task.demonstrate(prompt, random.Random(0)) == f"#{prompt.answer}"
    with pytest.raises(ValueError, match=r"set ProblemFiles\.solution to the column that holds them"):
        ProblemFiles(file, RIGHT).demonstrate(prompt, random.Random(0))
    settings = Warmup()
    before = settings.fingerprint("model", task, Template(), "float32")
    write(tmp_path, [*sums(29), {**sums(30)[29], "solution": "#0"}])
    changed = ProblemFiles(file, RIGHT, solution="solution")
    assert settings.fingerprint("model", changed, Template(), "float32") != before
    write(tmp_path, sums(30))
    again = ProblemFiles(file, RIGHT, solution="solution")
    assert settings.fingerprint("model", again, Template(), "float32") == before


def test_only_what_is_imitated_repeats_a_warm_start(tmp_path: Path) -> None:
    """Rewards, their weights and test problems may change; columns and the share that is held out may not."""
    file, other = write(tmp_path, sums(30)), tmp_path / "other.jsonl"
    other.write_text(Path(file).read_text())
    plain = ProblemFiles(file, RIGHT, solution="solution")

    def same(**changed: Any) -> bool:
        task = replace(plain, **changed)
        prints = [Warmup().fingerprint("model", t, Template(), "float32") for t in (plain, task)]
        return prints[0] == prints[1]

    assert same(rewards={"right": ExactMatch(weight=0.5), "length": Length()}, outcome="length", correct_at=0.5)
    assert same(test=str(other))
    assert same(train=str(other))  # the same content
    for changed in (
        {"solution": "answer"},
        {"val_share": 0.5},
        {"seed": 1},
        {"meta": ["solution"]},
        {"val": str(other)},
    ):
        assert not same(**changed), changed


def test_a_task_travels_without_its_problems(tmp_path: Path) -> None:
    """Verifier processes get what they need to judge."""
    task = ProblemFiles(write(tmp_path, sums(2000)), {**RIGHT, "length": Length()})
    prompt = task.prompts("train")[0]
    sent = pickle.dumps(task)
    assert len(sent) < 2000
    copy = pickle.loads(sent)
    assert copy == task
    assert prompt.answer is not None
    assert copy.score(prompt, "1") == task.score(prompt, "1")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rewards": {}}, "ProblemFiles.rewards is empty; name at least one"),
        ({"rewards": {"a/b": ExactMatch()}}, "reward name 'a/b' has more than letters, digits and _ . -"),
        ({"rewards": {"a": ExactMatch(weight=math.inf)}}, "the weight of reward 'a' must be a finite number, got inf"),
        ({"rewards": {"a": ExactMatch(weight=0.0)}}, "the weights of all rewards are 0"),
        ({"outcome": "rihgt"}, "ProblemFiles.outcome names no reward: 'rihgt'; did you mean right?"),
        ({"outcome": "x"}, "ProblemFiles.outcome names no reward: 'x'; there are right"),
        ({"answer": None}, "reward 'right' (ExactMatch) compares with a reference answer, but ProblemFiles.answer is"),
        ({"val_share": 1.0}, "ProblemFiles.val_share must be at least 0 and below 1, got 1.0"),
        ({"val_share": -0.1}, "ProblemFiles.val_share must be at least 0 and below 1, got -0.1"),
        ({"meta": ["source"]}, "the column name 'source' is taken"),
        ({"train": "problem.jsonl"}, "there is no file problem.jsonl in {folder}; did you mean problems.jsonl?"),
        ({"val": "problem.jsonl"}, "there is no file problem.jsonl in {folder}; did you mean problems.jsonl?"),
        ({"test": "problems.xlsx"}, "cannot read problems.xlsx: unknown suffix '.xlsx'; known are"),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    """Refused when the task is made, before anything is read."""
    write(tmp_path, sums(3))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=re.escape(message.replace("{folder}", str(tmp_path)))):
        ProblemFiles(**{"train": "problems.jsonl", "rewards": RIGHT, **options})


YAML = r"""
task:
  class_path: ProblemFiles
  init_args:
    train: problems.jsonl
    test: hf:openai/gsm8k:main@test
    solution: solution
    meta: [level]
    rewards:
      right: {class_path: ExactMatch, init_args: {pattern: '#(\d+)$', weight: 2}}
      own: {class_path: PythonFunction, init_args: {function: "own.py:f", kwargs: {mark: "#", n: 3, b: true}}}
      maths: MathVerify
"""


def test_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short names, options of rewards, and paths that start at the YAML file, from whichever folder it is used."""
    write(tmp_path, sums(30))
    (tmp_path / "own.py").write_text("def f(response, mark, n, b):\n    return n if b and mark == '#' else 0\n")
    (tmp_path / "task.yaml").write_text(YAML)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    parser = ArgumentParser(parser_mode="omegaconf+")
    parser.add_argument("--config", action="config")
    parser.add_argument("--task", type=Task)
    parsed = parser.parse_args(["--config", "../task.yaml", "--task.val_share=0", "--task.rewards.own.weight=3"])
    task: ProblemFiles = parser.instantiate(parsed).task
    assert task.rewards["right"] == ExactMatch(r"#(\d+)$", weight=2.0)
    assert task.rewards["maths"] == MathVerify()
    assert task.test == "hf:openai/gsm8k:main@test"
    assert task.prompts("train")[4] == Prompt(
        4, "4+1?", "5", {"level": 1, "solution": "#5", "source": "problems.jsonl:5"}
    )
    assert task.score(Prompt(0, "?", "5"), "is 5#5") == Score(12.0, True, "5", {"right": 1.0, "own": 3.0, "maths": 1.0})
    written = parser.dump(parsed)
    assert f"train: {tmp_path}/problems.jsonl" in written
    assert f"function: {tmp_path}/own.py:f" in written
