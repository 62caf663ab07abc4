"""The user's own problems, from files or Hugging Face datasets, with rewards of the user's choice."""

from __future__ import annotations

import hashlib
import logging
import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from lit_rlvr.near import did_you_mean
from lit_rlvr.places import Place, existing_file
from lit_rlvr.rewards import Judgement, Reward
from lit_rlvr.tasks.base import Prompt, Score, Split, Task
from lit_rlvr.tasks.columns import ProblemSet, cell, check_columns, check_text, plain_answer
from lit_rlvr.tasks.readers import HUB, READERS, Row, read_rows, reader_of

log = logging.getLogger(__name__)

SOURCE = "source"
NAMED = 5
"""How many rows that are left out are named in the log."""


@dataclass(frozen=True)
class ProblemFiles(Task):
    """Problems from your own files, judged by rewards that you choose.

    Files end in .jsonl (or .ndjson), .json (a list of objects), .csv, .tsv or .parquet; ``hf:NAME[:CONFIG][@SPLIT]`` is
    a dataset of the Hugging Face hub. In YAML a relative path starts at the folder of the YAML file. Rows that cannot
    be used are left out, counted, and the first five are named in the log.

    Args:
        train: File or dataset of training problems.
        rewards: Rewards by name; learning maximises the sum of weight times reward, and each is logged apart.
        val: Validation problems, or several sets of them by name, each of which is reported apart and in their mean;
            null: a share of ``train`` is held out.
        test: Test problems, or several sets of them; null: there are none.
        question: Column of the question. Dots reach into nested columns, as in ``prompt.0.content``.
        question_pattern: Regular expression that finds the question in its column of ``train``, as its first group,
            where that holds a whole prompt; null: the column is the question.
        answer: Column of the reference answer; null: the rewards need none.
        solution: Column of a response to imitate in a warm start; null: there is none.
        meta: Columns that rewards may look at, in ``Prompt.meta``.
        outcome: Name of the reward that decides whether a response is correct; null: the first.
        correct_at: A response is correct if that reward is at least this.
        val_share: Share of ``train`` that is held out where ``val`` is null. Equal questions stay together, and a
            problem stays on its side when others are added.
        seed: Seed of the choice of held-out problems.

    Raises:
        ValueError: When a file is missing or of unknown kind, or the rewards do not go together.
    """

    train: Place
    rewards: Mapping[str, Reward]
    val: Mapping[str, ProblemSet] | Place | None = None
    test: Mapping[str, ProblemSet] | Place | None = None
    question: str = "question"
    question_pattern: str | None = None
    answer: str | None = "answer"
    solution: str | None = None
    meta: list[str] = field(default_factory=list)
    outcome: str | None = None
    correct_at: float = 1.0
    val_share: float = 0.1
    seed: int = 0
    isolated: bool = field(init=False, repr=False)
    reward_names: tuple[str, ...] = field(init=False, repr=False)
    digest: str = field(init=False, repr=False)
    """A hash of the training file's content."""

    def __post_init__(self) -> None:
        check_rewards(self.rewards, self.outcome, self.answer)
        check_pattern(self.question_pattern)
        places: list[str] = []
        for sets in (self.val, self.test):
            if isinstance(sets, Mapping):
                check_sets(sets)
                places += [one.path for one in sets.values()]
            elif sets is not None:
                places.append(sets)
        if not 0 <= self.val_share < 1:
            raise ValueError(f"ProblemFiles.val_share must be at least 0 and below 1, got {self.val_share}")
        if SOURCE in (*self.meta, self.solution):
            raise ValueError(f"the column name {SOURCE!r} is taken: Prompt.meta[{SOURCE!r}] is a row's file and line")
        object.__setattr__(self, "isolated", any(reward.isolated for reward in self.rewards.values()))
        object.__setattr__(self, "reward_names", tuple(self.rewards))
        for place in places:
            if not place.startswith(HUB):
                existing_problems(place)
        object.__setattr__(self, "digest", digest(self.train))

    def __getstate__(self) -> dict[str, Any]:
        """Without the problems: each comes with its answer to the process that judges it."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @cached_property
    def _read(self) -> dict[str, list[Prompt]]:
        """What was read so far, by split."""
        return {}

    def prompts(self, split: Split) -> Sequence[Prompt]:
        if split not in self._read:
            place = {"train": self.train, "val": self.val, "test": self.test}[split]
            if split != "test" and self.val is None and self.val_share:
                self._read.update(self._hold_out(self._load(self.train, "train")))
            elif isinstance(place, Mapping):
                self._read[split] = self._load_sets(place, split)
            elif place is not None:
                self._read[split] = self._load(place, split)
            else:
                why = "ProblemFiles.test is null" if split == "test" else "ProblemFiles.val is null and val_share is 0"
                more = ", or use `lit-rlvr validate`" if split == "test" else ""
                raise ValueError(f"{why}, so there are no {split} problems; name a file there{more}")
        return self._read[split]

    def score(self, prompt: Prompt, response: str) -> Score:
        judgements = {name: self._judge(name, prompt, response) for name in self.rewards}
        outcome = judgements[self.outcome or self.reward_names[0]]
        parts = {name: judgement.reward for name, judgement in judgements.items()}
        total = sum(reward.weight * parts[name] for name, reward in self.rewards.items())
        return Score(total, outcome.reward >= self.correct_at, outcome.answer, parts)

    def demonstrate(self, prompt: Prompt, rng: random.Random) -> str:
        if self.solution is None:
            raise ValueError("a warm start imitates solutions: set ProblemFiles.solution to the column that holds them")
        return str(prompt.meta[self.solution])

    def demonstration_facts(self) -> dict[str, Any]:
        """The training problems and their columns; rewards are free to change."""
        held_out_share = (self.val_share, self.seed) if self.val is None else None
        columns = (self.question, self.question_pattern, self.answer, self.solution, self.meta)
        return {"content": self.digest, "columns": columns, "held out": held_out_share}

    def _judge(self, name: str, prompt: Prompt, response: str) -> Judgement:
        try:
            return self.rewards[name](prompt, response)
        except (Exception, SystemExit) as error:  # the user's code may raise anything; named, it can travel
            raise RuntimeError(f"reward {name!r} raised {type(error).__name__}: {error}") from error

    def _hold_out(self, prompts: list[Prompt]) -> dict[str, list[Prompt]]:
        """Divide the training problems into training and validation."""
        sides: dict[str, list[Prompt]] = {"train": [], "val": []}
        for prompt in prompts:
            side = sides["val" if held_out(prompt.question, self.seed, self.val_share) else "train"]
            side.append(replace(prompt, index=len(side)))
        for split, side in sides.items():
            if not side:
                raise ValueError(
                    f"val_share={self.val_share} of the {len(prompts)} problems of {self.train} leaves none for "
                    f"{split}; change it, or name a file in ProblemFiles.val"
                )
        return sides

    def _load_sets(self, sets: Mapping[str, ProblemSet], split: Split) -> list[Prompt]:
        """The problems of several sets, one after the other."""
        prompts = list[Prompt]()
        for name, one in sets.items():
            own = replace(
                self, train=one.path, val=None, test=None, question=one.question or self.question,
                answer=one.answer or self.answer, question_pattern=None,
            )  # fmt: skip
            prompts += [replace(p, index=len(prompts) + p.index, benchmark=name) for p in own._load(one.path, split)]
        return prompts

    def _load(self, place: str, split: Split) -> list[Prompt]:
        """The problems of one file; rows that cannot be used are left out and named."""
        solution = [self.solution] if self.solution is not None and split == "train" else []
        columns = [self.question, *([self.answer] if self.answer is not None else []), *self.meta, *solution]
        prompts, left_out, rows, known = list[Prompt](), list[str](), 0, dict[str, None]()
        for row in read_rows(place, split):
            rows += 1
            known |= dict.fromkeys(row.values)
            try:
                prompts.append(self._prompt(row, columns, solution, split, len(prompts)))
            except ValueError as error:
                left_out.append(f"{row.source}: {error}")
        if known:
            check_columns(place, columns, known)
        named = "; ".join(left_out[:NAMED]) + ("; ..." if len(left_out) > NAMED else "")
        if not prompts:
            raise ValueError(f"{place} has no problem that can be used: {named or 'it has no rows'}")
        if left_out:
            log.warning("%d of %d rows of %s are left out: %s", len(left_out), rows, place, named)
        return prompts

    def _prompt(self, row: Row, columns: list[str], solution: list[str], split: Split, index: int) -> Prompt:
        """The problem of a row; raises ValueError with what is wrong with it."""
        if row.problem is not None:
            raise ValueError(row.problem)
        cells = {column: cell(row.values, column) for column in columns}
        for column in (self.question, *solution):
            check_text(column, cells[column])
        question = str(cells[self.question])
        if self.question_pattern is not None and split == "train":
            found = re.search(self.question_pattern, question, re.DOTALL)
            if found is None or not found[1].strip():
                raise ValueError(f"question_pattern finds nothing in column {self.question!r}")
            question = found[1]
        answer = None if self.answer is None else plain_answer(self.answer, cells[self.answer])
        meta = {column: cells[column] for column in (*self.meta, *solution)}
        return Prompt(index, question, answer, {**meta, SOURCE: row.source})


def held_out(question: str, seed: int, share: float) -> bool:
    """Whether a question belongs to the held-out ``share``: a pure function of the question and the seed."""
    number = int.from_bytes(hashlib.sha256(f"{seed}\n{question}".encode()).digest()[:8], "big")
    return number < share * 2**64


def existing_problems(place: str) -> Path:
    """The file at ``place``, which must exist and be of a known kind."""
    reader_of(place)
    return existing_file(place, READERS)


def digest(place: str) -> str:
    """A hash of the content of a problem file; of a dataset, the name."""
    if place.startswith(HUB):
        return hashlib.sha256(place.encode()).hexdigest()[:16]
    with existing_problems(place).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def check_sets(sets: Mapping[str, ProblemSet]) -> None:
    """Refuse held-out sets that metrics cannot be named after."""
    if not sets:
        raise ValueError("ProblemFiles has held-out sets, but none is named; name one, or leave it null")
    for name in sets:
        if not re.fullmatch(r"[\w-]+", name, re.ASCII):
            raise ValueError(f"the held-out set {name!r} has more than letters, digits, _ and - in its name")


def check_pattern(pattern: str | None) -> None:
    """Refuse a pattern that cannot find a question."""
    if pattern is None:
        return
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise ValueError(f"ProblemFiles.question_pattern is no regular expression: {error}") from error
    if groups < 1:
        raise ValueError("ProblemFiles.question_pattern needs a group, in brackets, for the question")


def check_rewards(rewards: Mapping[str, Reward], outcome: str | None, answer: str | None) -> None:
    """Refuse rewards that do not go together.

    Raises:
        ValueError: Naming the reward.
    """
    if not rewards:
        raise ValueError("ProblemFiles.rewards is empty; name at least one, for example rewards: {right: ExactMatch}")
    for name, reward in rewards.items():
        if not re.fullmatch(r"[\w.-]+", name, re.ASCII):
            raise ValueError(
                f"reward name {name!r} has more than letters, digits and _ . -; a metric is named after it"
            )
        if not math.isfinite(reward.weight):
            raise ValueError(f"the weight of reward {name!r} must be a finite number, got {reward.weight}")
        if reward.needs_answer and answer is None:
            raise ValueError(
                f"reward {name!r} ({type(reward).__name__}) compares with a reference answer, but ProblemFiles.answer "
                "is null; set it to the column that holds the answers"
            )
    if all(reward.weight == 0 for reward in rewards.values()):
        raise ValueError("the weights of all rewards are 0, so there is nothing to learn")
    if outcome is not None and outcome not in rewards:
        hint = did_you_mean(outcome, rewards) or f"; there are {', '.join(rewards)}"
        raise ValueError(f"ProblemFiles.outcome names no reward: {outcome!r}{hint}")
