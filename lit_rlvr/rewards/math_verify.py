"""Is the answer mathematically equal to the reference answer? Asked of the math-verify package (Apache-2.0)."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from lit_rlvr.rewards.base import Judgement, Reward, reference

if TYPE_CHECKING:
    from lit_rlvr.tasks.base import Prompt

NO_TIMER = 0
"""math-verify's own time limit is a signal, which works in a main thread only; the verifier's pool has a better one."""


@dataclass(frozen=True)
class MathVerify(Reward):
    r"""1 if the response's answer equals the reference answer as mathematics, else 0: ``\boxed{0.5}`` equals ``1/2``.

    The answer is looked for in ``\boxed{}``, then in LaTeX, then as the last plain number. The reference answer is read
    as LaTeX, with or without ``$`` or ``\boxed{}`` around it.

    Some answers, such as ``9^{9^{9^{9}}}``, would take for ever; they are ended by the data module's
    ``verifier_timeout``, count as wrong and are counted as failures.

    Args:
        weight: Its factor in the sum of all rewards.
    """

    weight: float = 1.0
    isolated = True
    needs_answer = True

    def __call__(self, prompt: Prompt, response: str) -> Judgement:
        from math_verify import verify

        gold = parse_gold(reference(prompt))
        found = parse(response)
        answer = next((part for part in found if isinstance(part, str)), None)
        return Judgement(float(bool(found) and bool(verify(list(gold), found, timeout_seconds=NO_TIMER))), answer)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Import math-verify while a process starts, not within the time limit of its first answer."""
        vars(self).update(state)
        parse("1")


def parse(text: str) -> list[Any]:
    """The expression in ``text`` and how it is written there; empty when there is none."""
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # warns that its timers are off
    from math_verify import parse

    found: list[Any] = parse(text, parsing_timeout=NO_TIMER)
    return found


@lru_cache(maxsize=1024)
def parse_gold(answer: str) -> tuple[Any, ...]:
    r"""The reference answer as mathematics; one without LaTeX's marks is put into a box.

    Raises:
        ValueError: When there is no mathematics in it.

    >>> parse_gold(r"\frac{1}{2}")[0], parse_gold("$0.5$")[0]
    (1/2, 1/2)
    """
    marked = "$" in answer or "\\boxed" in answer
    found = parse(answer if marked else f"\\boxed{{{answer}}}")
    if not found:
        raise ValueError(f"the reference answer {answer!r} cannot be read as mathematics")
    return tuple(found)
