"""Training on one's own problems with one's own rewards: the example, and what a run says and logs."""

from __future__ import annotations

import csv
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from command_line import QUICKSTART, cli, succeed
from rollouts import ThreadedReduce, build_rollout, run_ranks
from tiny_models import char_tokenizer

from lit_rlvr.collect import Tally
from lit_rlvr.data import RLVRDataModule
from lit_rlvr.reduce import LocalReduce
from lit_rlvr.rewards import ExactMatch, PythonFunction
from lit_rlvr.rewards.function import load
from lit_rlvr.tasks import ProblemFiles, Score

EXAMPLE = Path(__file__).parents[1] / "examples/own_problems"
CSV = ("--config", str(EXAMPLE.parents[1] / "configs/logger/csv.yaml"))

TASK = """
data:
  task:
    class_path: ProblemFiles
    init_args:
      train: problems.jsonl
      rewards:
        right: ExactMatch
        even: {class_path: PythonFunction, init_args: {function: rewards_of_a_user.even, weight: 0.5}}
"""
FUNCTION = "def even(response):\n    return len(response) % 2 == 0\n"


def logged(root: Path) -> list[dict[str, float]]:
    """The rows of the CSV logger that hold a rollout phase."""
    (file,) = (root / "metrics").rglob("metrics.csv")
    rows = [
        {name: float(value) for name, value in row.items() if value}
        for row in csv.DictReader(file.read_text().splitlines())
    ]
    return [row for row in rows if "rollout/reward" in row]


def test_the_file_is_what_the_script_writes() -> None:
    """Byte for byte; 200 problems whose answers are right, with solutions that often are not."""
    made: str = load(f"{EXAMPLE}/make_problems.py:problems")()
    assert (EXAMPLE / "problems.jsonl").read_bytes() == made.encode()
    rows = [json.loads(line) for line in made.splitlines()]
    assert len({row["question"] for row in rows}) == 200
    assert all(eval(row["question"][:-1]) == int(row["answer"]) for row in rows)
    right = sum(row["solution"].endswith(f"#{row['answer']}") for row in rows)
    assert 110 < right < 130


@pytest.mark.parametrize(
    ("response", "answer", "reward"),
    [
        ("(7+5=12)|(2+5=7)#72", "82", 0.5),
        ("#82", "82", 1.0),
        ("#182", "82", 2 / 3),
        ("82", "82", 0.0),
        ("#", "82", 0.0),
    ],
)
def test_the_reward_of_the_example(response: str, answer: str, reward: float) -> None:
    """The share of digits in their place, and nothing without an answer."""
    digits = PythonFunction(f"{EXAMPLE}/rewards.py:digits")
    (prompt,) = [p for p in ProblemFiles(f"{EXAMPLE}/problems.jsonl", {"d": digits}).prompts("train") if p.index == 0]
    judged = digits(SimpleNamespace(answer=answer, question=prompt.question, meta={}), response)  # type: ignore[arg-type]
    torch.testing.assert_close(judged.reward, reward)


def test_a_run_with_a_function_of_the_user(tmp_path: Path) -> None:
    """From the folder that it lies in, judged in other processes; the parts are logged and make up the reward."""
    (tmp_path / "rewards_of_a_user.py").write_text(FUNCTION)
    (tmp_path / "problems.jsonl").write_bytes((EXAMPLE / "problems.jsonl").read_bytes())
    (tmp_path / "task.yaml").write_text(TASK)
    sizes = ("--model.batch.prompts=4", "--model.batch.minibatch_prompts=2", "--model.dynamic_sampling=null")
    config = (*QUICKSTART, "--config", "task.yaml", *CSV, "--warmup=null", "--data.eval_prompts=4", *sizes)
    succeed(tmp_path, "fit", *config, "--trainer.max_steps=4")
    rows = logged(tmp_path / "runs/quickstart")
    assert len(rows) == 2
    for row in rows:
        assert row["rollout/reward_right"] == row["rollout/correct"] == 0.0
        assert 0 < row["rollout/reward_even"] < 1
        assert row["rollout/verifier_failures"] == 0
        torch.testing.assert_close(row["rollout/reward"], 0.5 * row["rollout/reward_even"])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("rewards_of_a_user.even", "rewards_of_a_user.evn", "has no function 'evn'; did you mean even?"),
        ("problems.jsonl", "problem.jsonl", "there is no file problem.jsonl in {folder}; did you mean problems.jsonl?"),
        ("right: ExactMatch", "right: {class_path: ExactMatch, init_args: {pattern: x}}", "'x' has 0 groups"),
    ],
)
def test_mistakes_are_told_before_the_run(tmp_path: Path, old: str, new: str, message: str) -> None:
    """In a sentence, without a traceback."""
    (tmp_path / "rewards_of_a_user.py").write_text(FUNCTION)
    (tmp_path / "problems.jsonl").write_bytes((EXAMPLE / "problems.jsonl").read_bytes())
    (tmp_path / "task.yaml").write_text(TASK.replace(old, new))
    outcome = cli(tmp_path, "fit", *QUICKSTART, "--config", "task.yaml", "--warmup=null", "--trainer.max_steps=1")
    assert outcome.code == 2
    assert message.replace("{folder}", str(tmp_path)) in " ".join(outcome.err.split())
    assert "Traceback" not in outcome.err


def test_reward_parts_are_means_over_all_ranks() -> None:
    """Also where a rank's verifier failed on every answer, and another rank has no answers at all."""
    scores = [Score(0.0, False, None, {"own": 0.25, "right": 1.0}), Score(0.0, False, None, {"right": 0.5, "own": 0.5})]
    shares = [scores, [Score(0.0, False)] * 2, []]

    def rank(reduce: ThreadedReduce) -> dict[str, float]:
        tally = Tally(reward_names=("right", "own"))
        if shares[reduce.rank]:
            tally.add(build_rollout([[0.5], [0.5, 1.0]]), 0, shares[reduce.rank])
        return tally.read(reduce)

    for metrics in run_ranks(3, rank):
        assert (metrics["rollout/reward_right"], metrics["rollout/reward_own"]) == (1.5 / 4, 0.75 / 4)
    assert not [name for name in Tally().read(LocalReduce()) if name.startswith("rollout/reward_")]


def test_over_long_prompts_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The first five, by file and line."""
    lines = [json.dumps({"question": "1" * length, "answer": "1"}) + "\n" for length in (1, 4, 4, 2, 4, 4, 4, 4)]
    (tmp_path / "p.jsonl").write_text("".join(lines))
    data = RLVRDataModule(
        ProblemFiles(f"{tmp_path}/p.jsonl", {"right": ExactMatch()}, val_share=0), max_prompt_tokens=3
    )
    module: Any = SimpleNamespace(tokenizer=char_tokenizer())
    data.trainer = SimpleNamespace(lightning_module=module)  # type: ignore[assignment]
    with caplog.at_level(logging.WARNING):
        assert [e.prompt.index for e in data.encoded("train")] == [0, 3]
    assert caplog.messages == [
        "6 of 8 train prompts are longer than max_prompt_tokens=3 and are left out: "
        "p.jsonl:2, p.jsonl:3, p.jsonl:5, p.jsonl:6, p.jsonl:7, ..."
    ]


@pytest.mark.slow
@pytest.mark.timeout(450)
def test_the_example_learns(tmp_path: Path) -> None:
    """With the console script, from another folder than the example's, in fewer steps than the example takes."""
    script = Path(sys.executable).with_name("lit-rlvr")
    options = (*QUICKSTART, "--config", str(EXAMPLE / "train.yaml"), *CSV, "--trainer.max_steps=60")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [script, "fit", *options],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    root = tmp_path / "runs/own_problems"
    evaluations = json.loads((root / "report.json").read_text())["evaluations"]
    assert evaluations["base"]["sampled/mean_at_1"] < 0.1
    assert 0.4 < evaluations["after warm start"]["sampled/mean_at_1"] < 0.75
    assert evaluations["after RLVR"]["sampled/mean_at_1"] > evaluations["after warm start"]["sampled/mean_at_1"] + 0.1
    rows = logged(root)
    assert sum(row["rollout/reward_digits"] for row in rows[-5:]) > sum(
        row["rollout/reward_digits"] for row in rows[:5]
    )
    for row in rows:
        assert row["rollout/reward_right"] == row["rollout/correct"]
        torch.testing.assert_close(row["rollout/reward"], row["rollout/correct"] + 0.2 * row["rollout/reward_digits"])
