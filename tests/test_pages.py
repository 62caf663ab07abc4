"""Pages of sample rollouts: what they say about a phase made by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rollouts import build_rollout

from lit_rlvr.credit import CreditContext
from lit_rlvr.data import Ticket
from lit_rlvr.phase import Phase
from lit_rlvr.rollout_pages import RolloutPages, page, rollout_rows
from lit_rlvr.tasks import Prompt
from lit_rlvr.types import Credit, RolloutBatch

WORDS = ("<b>", "&amp;", '"', "é", " a\n", "'x'")


class Words:
    """A tokenizer with a few awkward words; token n is word n modulo their number."""

    def decode(self, ids: list[int]) -> str:
        return "".join(WORDS[i % len(WORDS)] for i in ids)


class Spans(HTMLParser):
    """Reads back a page as a browser does: the tokens with their attributes, questions and verdicts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tokens: list[list[tuple[str, dict[str, Any]]]] = []
        self.questions: list[str] = []
        self.small: list[str] = []
        self.unknown: set[str] = set()
        self._open: list[tuple[str, dict[str, Any]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag != "meta":
            self._open.append((tag, dict(attrs)))
        if tag not in ("meta", "title", "style", "h1", "p", "span", "div", "small", "b"):
            self.unknown.add(tag)
        if dict(attrs).get("class") == "t":
            self.tokens.append([])

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        tags, (tag, attributes) = [t for t, _ in self._open], self._open[-1]
        if tag == "span" and "title" in attributes:
            self.tokens[-1].append((data, attributes))
        elif attributes.get("class") == "q":
            self.questions.append(data)
        elif "small" in tags:
            self.small.append(data)


@pytest.fixture
def rollout() -> RolloutBatch:
    """Three responses: two to prompt 5, one to prompt 9."""
    facts = build_rollout([[0.5, 2.0, 0.0], [1.0, 0.25], [0.125]], group=[5, 5, 9])
    questions = ("1 < 2 & 3?", "1 < 2 & 3?", "second")
    return replace(
        facts,
        response_ids=torch.tensor([[0, 1, 2], [3, 4, 0], [5, 0, 0]]),
        rewards=torch.tensor([1.5, 0.0, 0.25]),
        correct=torch.tensor([1.0, 0.0, 0.0]),
        prompts=tuple(Prompt(i, q, "<7>" if i else None) for i, q in enumerate(questions)),
        texts=('<b>&amp;"', "é a\n", "'x'"),
    )


@pytest.fixture
def phase(rollout: RolloutBatch) -> Phase:
    """All ways of (not) learning: weight and advantage, either one, neither; a negative advantage learns."""
    credit = Credit(
        advantage=torch.tensor([[0.5, 0.5, 0.0], [-1.23456, 0.0, 0.0], [-0.25, 0.0, 0.0]]),
        weight=torch.tensor([[1.0, 0.0, 1.0], [0.333333, 0.0, 0.0], [1.0, 0.0, 0.0]]),
        count=rollout.response_mask.float(),
    )
    return Phase(20, [], {}, rollout, credit, 0.0, CreditContext())


def test_rows_hold_the_facts(phase: Phase) -> None:
    """Everything about a response, padding left out, rounded to four digits."""
    first, second, third = rollout_rows(phase, Words(), groups=4)
    assert first == {
        "uid": [0, 5, 0], "question": "1 < 2 & 3?", "answer": None, "response": '<b>&amp;"', "reward": 1.5,
        "correct": True, "advantage": [0.5, 0.5, 0.0], "weight": [1.0, 0.0, 1.0], "entropy": [0.5, 2.0, 0.0],
        "tokens": ["<b>", "&amp;", '"'],
    }  # fmt: skip
    assert second["advantage"] == [-1.2346, 0.0]
    assert second["weight"] == [0.3333, 0.0]
    assert (second["tokens"], second["correct"], second["uid"]) == (["é", " a\n"], False, [0, 5, 1])
    assert (third["tokens"], third["question"], third["answer"]) == (["'x'"], "second", "<7>")


def test_only_the_first_groups_are_shown(phase: Phase) -> None:
    assert [row["uid"][1] for row in rollout_rows(phase, Words(), groups=1)] == [5, 5]


def test_the_page_shows_tokens_as_they_are(phase: Phase) -> None:
    """Read back as HTML, every token, question and answer is the text that it was; nothing became a tag."""
    rows = rollout_rows(phase, Words(), groups=4)
    seen = Spans(page(rows, 20))
    assert [[text for text, _ in response] for response in seen.tokens] == [row["tokens"] for row in rows]
    assert seen.questions == [row["question"] for row in rows]
    assert seen.unknown == set()
    assert "answer <7>" in "".join(seen.small)


def test_underlined_is_what_learns(phase: Phase) -> None:
    """Weight and advantage both differ from zero."""
    seen = Spans(page(rollout_rows(phase, Words(), groups=4), 20))
    marks = [[attributes["class"] or "" for _, attributes in response] for response in seen.tokens]
    assert marks == [["k", "", ""], ["k", ""], ["k"]]


def test_numbers_and_colours(phase: Phase) -> None:
    """Hover text, the background's strength as a share of the page's highest entropy, verdict and reward."""
    text = page(rollout_rows(phase, Words(), groups=4), 20)
    seen = Spans(text)
    titles = [attributes["title"] for response in seen.tokens for _, attributes in response]
    assert titles == [
        "entropy 0.500, advantage 0.50", "entropy 2.000, advantage 0.50", "entropy 0.000, advantage 0.00",
        "entropy 1.000, advantage -1.23", "entropy 0.250, advantage 0.00", "entropy 0.125, advantage -0.25",
    ]  # fmt: skip
    shares = [a["style"].rsplit(",", 1)[1] for response in seen.tokens for _, a in response]
    assert shares == ["0.25)", "1.00)", "0.00)", "0.50)", "0.12)", "0.06)"]
    assert "up to 2.00 nats" in text
    assert "Rollouts of phase 20" in text
    assert [(m, r) for m, r in zip(seen.small[::2], seen.small[1::2], strict=True)] == [
        ("right", ", reward 1.50, answer None"),
        ("wrong", ", reward 0.00, answer <7>"),
        ("wrong", ", reward 0.25, answer <7>"),
    ]


def test_a_page_without_entropy_is_white(phase: Phase) -> None:
    """No division by an entropy of zero."""
    flat = replace(phase, rollout=replace(phase.rollout, entropies=torch.zeros(3, 3)))
    seen = Spans(page(rollout_rows(flat, Words(), groups=4), 0))
    assert {a["style"] for response in seen.tokens for _, a in response} == {"background:rgba(220,60,0,0.00)"}


def run(callback: RolloutPages, phase: Phase, folder: Path, minibatch: int = 0, first: bool = True) -> None:
    """End a batch as the Trainer does."""
    trainer: Any = SimpleNamespace(is_global_zero=first, default_root_dir=str(folder), loggers=[], global_step=1)
    module: Any = SimpleNamespace(phase=phase, tokenizer=Words())
    callback.on_train_batch_end(trainer, module, None, Ticket(phase.number, minibatch), 0)


def test_files_of_a_phase(phase: Phase, tmp_path: Path) -> None:
    """One JSON object per line that says the same as the rows, a page, and an index that links to every page."""
    callback = RolloutPages(every=10)
    run(callback, phase, tmp_path)
    run(callback, replace(phase, number=30), tmp_path)
    folder = tmp_path / "rollouts"
    rows = rollout_rows(phase, Words(), groups=4)
    lines = (folder / "phase_000020.jsonl").read_text(encoding="utf-8").removesuffix("\n").split("\n")
    assert [json.loads(line) for line in lines] == rows
    assert "é" in lines[1]
    assert (folder / "phase_000020.html").read_text(encoding="utf-8") == page(rows, 20)
    index = (folder / "index.html").read_text()
    assert index.index('<a href="phase_000020.html">phase 000020</a>') < index.index('href="phase_000030.html"')


@pytest.mark.parametrize(("step", "left"), [(0, []), (60, [20]), (62, [20, 30])])
def test_pages_of_an_earlier_run_go(phase: Phase, tmp_path: Path, step: int, left: list[int]) -> None:
    """A fresh run begins with none; one that is resumed at its first phase keeps those before it. Other files stay."""
    callback = RolloutPages(every=10)
    for number in (20, 30):
        run(callback, replace(phase, number=number), tmp_path)
    (tmp_path / "rollouts/phase_notes.txt").write_text("mine")
    module: Any = SimpleNamespace(batch=SimpleNamespace(steps_per_phase=2))
    for first in (False, True):
        trainer: Any = SimpleNamespace(is_global_zero=first, default_root_dir=str(tmp_path), global_step=step)
        callback.on_train_start(trainer, module)
        pages = [f"phase_{number:06d}" for number in (left if first else [20, 30])]
        assert sorted({file.stem for file in (tmp_path / "rollouts").glob("phase_0*")}) == pages
    index = (tmp_path / "rollouts/index.html").read_text()
    assert index.count("<li>") == len(left)
    assert (tmp_path / "rollouts/phase_notes.txt").exists()


def test_pages_are_written_when_they_are_due(phase: Phase, tmp_path: Path) -> None:
    """Every tenth phase, at its first optimiser step, by the first rank, unless the phase kept no group."""
    callback = RolloutPages(every=10)
    run(callback, replace(phase, number=25), tmp_path)
    run(callback, phase, tmp_path, minibatch=1)
    run(callback, phase, tmp_path, first=False)
    nothing = torch.zeros(0, dtype=torch.int64)
    run(callback, replace(phase, rollout=phase.rollout.rows(nothing), credit=phase.credit.rows(nothing)), tmp_path)
    assert not (tmp_path / "rollouts").exists()
    run(callback, phase, tmp_path)
    assert (tmp_path / "rollouts/phase_000020.jsonl").exists()


@pytest.mark.parametrize("wrong", [{"every": 0}, {"groups": 0}])
def test_numbers_below_one_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"RolloutPages\.every and groups must be at least 1"):
        RolloutPages(**wrong)
