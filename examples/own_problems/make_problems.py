"""Writes problems.jsonl: 200 sums of two numbers, with solutions by somebody who often forgets to carry."""

from __future__ import annotations

import json
import random
from itertools import product
from pathlib import Path

DIGITS = "2579"
ROWS = 200
CAREFUL = 0.4
"""How often a solution with a carry remembers it."""


def solution(a: int, b: int, careful: bool) -> str:
    """The working and the answer.

    >>> solution(27, 55, careful=True), solution(27, 55, careful=False)
    ('(7+5=12)|(2+5+1=8)#82', '(7+5=12)|(2+5=7)#72')
    """
    ones, tens = a % 10 + b % 10, a // 10 + b // 10
    carried = "+1" if careful and ones > 9 else ""
    tens += bool(carried)
    return f"({a % 10}+{b % 10}={ones})|({a // 10}+{b // 10}{carried}={tens})#{tens}{ones % 10}"


def problems() -> str:
    """The text of the file; the same every time."""
    rng = random.Random(0)
    numbers = [int(tens + ones) for tens, ones in product(DIGITS, DIGITS)]
    pairs = sorted(product(numbers, numbers), key=lambda pair: rng.random())[:ROWS]
    rows = [
        {"question": f"{a}+{b}?", "answer": str(a + b), "solution": solution(a, b, rng.random() < CAREFUL)}
        for a, b in pairs
    ]
    return "".join(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    Path(__file__).with_name("problems.jsonl").write_text(problems(), encoding="utf-8")
