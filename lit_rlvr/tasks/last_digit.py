"""A synthetic task that a laptop learns in seconds: the last digit of a short arithmetic expression."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from lit_rlvr.tasks.base import Prompt, Score, Split, Task

ALPHABET = "0123456789+-*?()=|#"
SIZES = {"train": 20_000, "val": 512, "test": 512}


@dataclass(frozen=True)
class LastDigitArithmetic(Task):
    """Evaluate ``2+1*8?`` modulo 10, one bracketed step at a time: ``2+(1*8=8)|(2+8=0)#0``.

    Expressions have 3 or 4 one-digit terms and are kept only if evaluating them from left to right is wrong, so the
    task is to learn that ``*`` comes first. A response is right if it has exactly one ``#`` and the text after it is
    the answer. The demonstrator of the warm start is imperfect on purpose: about a third of its answers are right.

    Args:
        seed: Seed of the problem sets.
    """

    seed: int = 0
    isolated = False

    def prompts(self, split: Split) -> Sequence[Prompt]:
        return _problem_sets(self.seed)[split]

    def score(self, prompt: Prompt, response: str) -> Score:
        answer = (response.split("#")[1] or None) if response.count("#") == 1 else None
        correct = answer == prompt.answer
        return Score(float(correct), correct, answer)

    def demonstrate(self, prompt: Prompt, rng: random.Random) -> str:
        digits, operators = parse(prompt.question)
        lines = []
        while operators:
            at = _demonstrated_step(operators, rng)
            value = apply(operators[at], digits[at], digits[at + 1])
            step = f"({digits[at]}{operators[at]}{digits[at + 1]}={value})"
            terms: list[str] = [*map(str, digits[:at]), step, *map(str, digits[at + 2 :])]
            signs = [*operators[:at], *operators[at + 1 :], ""]
            lines.append("".join(term + sign for term, sign in zip(terms, signs, strict=True)))
            digits, operators = [*digits[:at], value, *digits[at + 2 :]], [*operators[:at], *operators[at + 1 :]]
        return "|".join(lines) + f"#{digits[0]}"


def apply(operator: str, a: int, b: int) -> int:
    """One step, modulo 10.

    >>> apply("-", 2, 5)
    7
    """
    return {"+": a + b, "-": a - b, "*": a * b}[operator] % 10


def parse(question: str) -> tuple[list[int], list[str]]:
    """Digits and operators of a question.

    >>> parse("2+1*8?")
    ([2, 1, 8], ['+', '*'])
    """
    text = question.rstrip("?")
    return [int(c) for c in text[::2]], list(text[1::2])


def leftmost_valid(operators: list[str]) -> int:
    """The first step that the precedence of ``*`` allows.

    >>> leftmost_valid(["+", "*"]), leftmost_valid(["-", "+"])
    (1, 0)
    """
    return 1 if operators[0] != "*" and operators[1:2] == ["*"] else 0


def evaluate(digits: list[int], operators: list[str], *, precedence: bool = True) -> int:
    """The expression's value modulo 10, by precedence or from left to right."""
    digits, operators = list(digits), list(operators)
    while operators:
        at = leftmost_valid(operators) if precedence else 0
        digits[at : at + 2] = [apply(operators.pop(at), digits[at], digits[at + 1])]
    return digits[0]


def _demonstrated_step(operators: list[str], rng: random.Random) -> int:
    """Which step the imperfect demonstrator takes: .3 a valid one, .5 the leftmost, .2 any."""
    kind = rng.random()
    if kind < 0.3:
        return leftmost_valid(operators)
    return 0 if kind < 0.8 else rng.randrange(len(operators))


def _sample_question(rng: random.Random) -> str:
    """A question whose left-to-right value is wrong."""
    while True:
        terms = rng.choice((3, 4))
        operators: list[str] = []
        for _ in range(terms - 1):
            times = operators.count("*") < 2 and rng.random() < 0.4
            operators.append("*" if times else rng.choice("+-"))
        digits = [rng.randrange(10) for _ in range(terms)]
        if evaluate(digits, operators) != evaluate(digits, operators, precedence=False):
            return "".join(str(d) + o for d, o in zip(digits, [*operators, "?"], strict=True))


@lru_cache(maxsize=4)
def _problem_sets(seed: int) -> dict[str, list[Prompt]]:
    """All splits; a held-out question stands nowhere else, a training question may come twice."""
    rng, held_out = random.Random(seed), set[str]()
    sets: dict[str, list[Prompt]] = {}
    for split in ("test", "val", "train"):
        questions: list[str] = []
        while len(questions) < SIZES[split]:
            question = _sample_question(rng)
            if question not in held_out:
                questions.append(question)
                if split != "train":
                    held_out.add(question)
        sets[split] = [Prompt(i, q, str(evaluate(*parse(q)))) for i, q in enumerate(questions)]
    return sets
