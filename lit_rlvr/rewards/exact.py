"""Is the answer, letter for letter, the reference answer?"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lit_rlvr.rewards.base import Judgement, Reward, reference

if TYPE_CHECKING:
    from lit_rlvr.tasks.base import Prompt


@dataclass(frozen=True)
class ExactMatch(Reward):
    r"""1 if the answer found in the response equals the reference answer, else 0. White space around them is ignored.

    Args:
        pattern: Regular expression whose one group finds the answer, for example ``#(\d+)``; the last match counts.
            Empty: the whole response is the answer.
        ignore_case: Whether ``Paris`` equals ``paris``.
        weight: Its factor in the sum of all rewards.

    Raises:
        ValueError: When ``pattern`` is no regular expression with one group.
    """

    pattern: str = ""  # not null: in YAML, jsonargparse reads a `str | None` that begins with # as null
    ignore_case: bool = False
    weight: float = 1.0
    isolated = False
    needs_answer = True

    def __post_init__(self) -> None:
        if not self.pattern:
            return
        try:
            groups = re.compile(self.pattern).groups
        except re.error as error:
            raise ValueError(f"ExactMatch.pattern {self.pattern!r} is no regular expression: {error}") from error
        if groups != 1:
            raise ValueError(
                f"ExactMatch.pattern {self.pattern!r} has {groups} groups; put the answer, and nothing else, between "
                "( and ), and write other brackets as (?: )"
            )

    def __call__(self, prompt: Prompt, response: str) -> Judgement:
        answer = self.find(response)
        right = answer is not None and self._plain(answer) == self._plain(reference(prompt))
        return Judgement(float(right), answer)

    def find(self, response: str) -> str | None:
        r"""The answer in a response, or ``None``.

        >>> ExactMatch(pattern=r"#(\d+)").find("#4|no: #5")
        '5'
        """
        if not self.pattern:
            return response.strip()
        answer: str | None = None
        for match in re.finditer(self.pattern, response):
            answer = match.group(1)
        return None if answer is None else answer.strip()

    def _plain(self, answer: str) -> str:
        return answer.strip().casefold() if self.ignore_case else answer.strip()
