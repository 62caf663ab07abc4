"""Rewards: what they give, and what they refuse before a run begins."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lit_rlvr.rewards import ExactMatch, Judgement, MathVerify, PythonFunction
from lit_rlvr.tasks import Prompt

OWN = """
import numpy, sys
CONSTANT = 3

def everything(response, answer, question, meta, weight):
    return 1.0 if (response, answer, question, meta, weight) == ("r", "a", "q", {"level": 2}, 5) else 0.0

def brevity(response, limit=3):
    return len(response) <= limit

def greedy(**given):
    return len(given)

def value(meta):
    return {"float32": numpy.float32(0.5), "text": "1", "nothing": None, "int": 2}[meta["kind"]]

def positional(response, /):
    return 1

def unfilled(respones):
    return 1

class Rater:
    def __call__(self, response):
        return 0.25

rater = Rater()
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file of the user's, in the current folder, which modules are imported from."""
    path = tmp_path / "own_rewards.py"
    path.write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_rewards", raising=False)
    return str(path)


def value(reward: Any, response: str, answer: str | None = "a", **meta: Any) -> float:
    """The reward of one response."""
    judgement: Judgement = reward(Prompt(0, "q", answer, meta), response)
    return judgement.reward


@pytest.mark.parametrize(
    ("options", "response", "answer", "expected"),
    [
        ({}, " 42\n", "42 ", Judgement(1.0, "42")),
        ({}, "so 42", "42", Judgement(0.0, "so 42")),
        ({}, "", "42", Judgement(0.0, "")),
        ({}, "42.0", "42", Judgement(0.0, "42.0")),
        ({}, "PARIS", "Paris", Judgement(0.0, "PARIS")),
        ({"ignore_case": True}, "STRASSE", "Straße", Judgement(1.0, "STRASSE")),
        ({"pattern": r"#(\d+)"}, "#1 no: #42", "42", Judgement(1.0, "42")),
        ({"pattern": r"#(\d+)"}, "#42 no: #1", "42", Judgement(0.0, "1")),
        ({"pattern": r"#(\d+)"}, "42", "42", Judgement(0.0, None)),
        ({"pattern": r"<a>(.*?)</a>"}, "<a> x </a>", "x", Judgement(1.0, "x")),
        ({"pattern": r"yes (\d)|no"}, "yes 1, no", "1", Judgement(0.0, None)),
    ],
)
def test_exact_match(options: dict[str, Any], response: str, answer: str, expected: Judgement) -> None:
    """White space at the ends never counts, case only where asked for, and of several matches the last."""
    assert ExactMatch(**options)(Prompt(0, "q", answer), response) == expected


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("(", "is no regular expression"), (r"#\d", "has 0 groups"), ("(a)(b)", "has 2 groups; put the answer")],
)
def test_patterns_that_cannot_work(pattern: str, message: str) -> None:
    """At once, in a sentence."""
    with pytest.raises(ValueError, match=message):
        ExactMatch(pattern=pattern)


@pytest.mark.parametrize(
    ("answer", "response", "expected"),
    [
        ("1/2", r"so it is \boxed{0.5}", Judgement(1.0, r"\frac{1}{2}")),
        (r"\frac{1}{2}", "the answer is 1/2", Judgement(1.0, "1/2")),
        (r"2\pi", r"$\pi + \pi$", Judgement(1.0, r"\pi + \pi")),
        (r"2\pi", r"\boxed{2}", Judgement(0.0, "2")),
        (r"\boxed{1,000}", "1000", Judgement(1.0, "1000")),
        ("$x^2+1$", r"\boxed{1+x^2}", Judgement(1.0, "1+x^2")),
        ("She has 3 and 4. #### 7", "7", Judgement(1.0, "7")),
        ("7", "no idea", Judgement(0.0, None)),
        ("7", "", Judgement(0.0, None)),
    ],
)
def test_math_verify(answer: str, response: str, expected: Judgement) -> None:
    """Equal as mathematics, with the reference answer as bare LaTeX, in dollars or in a box."""
    assert MathVerify()(Prompt(0, "q", answer), response) == expected


def test_reference_answers_that_are_missing_or_unreadable() -> None:
    """Both are failures that name the problem, not wrong answers."""
    prompt = Prompt(3, "q", None, {"source": "p.jsonl:4"})
    for reward in (MathVerify(), ExactMatch()):
        with pytest.raises(ValueError, match=r"problem p\.jsonl:4 has no reference answer"):
            reward(prompt, "7")
    with pytest.raises(ValueError, match="the reference answer '' cannot be read as mathematics"):
        MathVerify()(Prompt(0, "q", ""), "7")


def test_a_function_gets_what_it_asks_for(own: str) -> None:
    """By the names of its parameters, from a file or a module; True is 1."""
    for function in (f"{own}:everything", "own_rewards.everything", "own_rewards.py:everything"):
        reward = PythonFunction(function, {"weight": 5})
        assert value(reward, "r", level=2) == 1.0
        assert value(reward, "s", level=2) == 0.0
    assert value(PythonFunction("own_rewards.brevity"), "abc") == 1.0
    assert value(PythonFunction("own_rewards.brevity", {"limit": 2}), "abc") == 0.0
    assert value(PythonFunction("own_rewards.greedy", {"more": 1}), "abc") == 5.0
    assert value(PythonFunction("own_rewards.rater"), "abc") == 0.25


def test_what_a_function_may_return(own: str) -> None:
    """Any number; what is none is a failure that names the function."""
    reward = PythonFunction(f"{own}:value")
    assert value(reward, "", kind="float32") == 0.5
    assert value(reward, "", kind="int") == 2.0
    for kind, name in (("text", "str"), ("nothing", "NoneType")):
        with pytest.raises(
            TypeError, match=f"own_rewards.py:value returned {name}, expected a bool, an int or a float"
        ):
            value(reward, "", kind=kind)


@pytest.mark.parametrize(
    ("function", "kwargs", "message"),
    [
        ("brevity", {}, "write module.name, or path/to/file.py:name"),
        ("own_reward.brevity", {}, "there is no module 'own_reward'; did you mean own_rewards?"),
        ("nowhere.at.all", {}, "has no nowhere.py, and it is not installed"),
        ("own_rewards.brevty", {}, "own_rewards has no function 'brevty'; did you mean brevity?"),
        ("own_rewards.py:brevty", {}, "own_rewards.py has no function 'brevty'; did you mean brevity?"),
        ("own_reward.py:brevity", {}, "there is no file own_reward.py in {folder}; did you mean own_rewards.py?"),
        ("lost/own.py:brevity", {}, "the folder {folder}/lost does not exist"),
        ("own_rewards.CONSTANT", {}, "own_rewards.CONSTANT is of type int, not a function"),
        ("own_rewards.brevity", {"limits": 2}, "has no parameter 'limits'; did you mean limit?"),
        ("own_rewards.brevity", {"response": "x"}, "may not set 'response': it is filled in for every answer"),
        (
            "own_rewards.unfilled",
            {},
            "nothing fills parameter 'respones' of own_rewards.unfilled; did you mean response?",
        ),
        ("own_rewards.everything", {}, "nothing fills parameter 'weight'"),
        ("own_rewards.positional", {}, "parameter 'response' of own_rewards.positional cannot be filled by name"),
        ("own_rewards.brevity", {"limit": 2, "answer": "x"}, "may not set 'answer'"),
    ],
)
def test_functions_that_cannot_work(own: str, function: str, kwargs: dict[str, Any], message: str) -> None:
    """Refused when the reward is made, with what is near."""
    with pytest.raises(ValueError, match=re.escape(message.replace("{folder}", str(Path(own).parent)))):
        PythonFunction(function, kwargs)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("import nosuch", "No module named 'nosuch'"),
        ("(", "SyntaxErr"),
    ],
)
def test_files_that_do_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, message: str) -> None:
    """The user's own mistake is told as it is, by file and by module, each time."""
    (tmp_path / "broken_rewards.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for function in ("broken_rewards.py:f", "broken_rewards.py:f", "broken_rewards.f"):
        with pytest.raises(ValueError, match=rf"cannot (run|import) broken_rewards.*{message}"):
            PythonFunction(function)


def test_a_file_may_import_its_neighbours(tmp_path: Path) -> None:
    """As a script may, whatever the current folder is."""
    (tmp_path / "neighbour_of_mine.py").write_text("LIMIT = 2\n")
    (tmp_path / "mine.py").write_text(
        "import neighbour_of_mine\ndef f(response):\n    return neighbour_of_mine.LIMIT\n"
    )
    assert value(PythonFunction(f"{tmp_path}/mine.py:f"), "") == 2.0


def test_rewards_travel_to_other_processes(own: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the function itself, which is loaded again where it is needed."""
    reward = PythonFunction(f"{own}:brevity", {"limit": 2}, weight=0.5)
    assert value(reward, "ab") == 1.0
    sent = pickle.dumps(reward)
    for name in [name for name in sys.modules if name.startswith("own_rewards")]:
        monkeypatch.delitem(sys.modules, name)  # as in a fresh process
    copy = pickle.loads(sent)
    assert copy == reward
    assert [value(copy, text) for text in ("ab", "abc")] == [1.0, 0.0]
    assert pickle.loads(pickle.dumps(MathVerify(weight=2.0))) == MathVerify(weight=2.0)


def test_importing_rewards_is_quick() -> None:
    """Neither torch nor the mathematics packages; and rewards may be imported before tasks."""
    code = "import sys, lit_rlvr.rewards; print([m for m in ('torch', 'sympy', 'datasets') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert out.stdout.strip() == "[]"
