"""A reward of our own: partial credit, so that a nearly right answer is worth more than a wild guess."""

from __future__ import annotations


def digits(response: str, answer: str) -> float:
    """The share of digits that stand in their place, counted from the right.

    >>> digits("(7+5=12)|(2+5=7)#72", "82"), digits("no answer", "82")
    (0.5, 0.0)
    """
    _, mark, found = response.rpartition("#")
    if not mark:
        return 0.0
    right = sum(ours == theirs for ours, theirs in zip(reversed(found), reversed(answer), strict=False))
    return right / max(len(found), len(answer))
