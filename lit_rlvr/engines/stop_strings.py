"""Strings that end a response: the last tokens of each row are kept on the CPU, and decoded where that can matter."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from typing import Any

UNFINISHED = "\ufffd"
"""What is decoded from a part of a character."""


class StopStrings:
    """Looks for strings in what rows end with.

    A string is completed by a token that has its last character, in whole or in part. Only where white space comes last
    can the next token complete it, because tokenizers may leave out white space at either end of a text.

    Args:
        tokenizer: Decodes.
        stop: The strings; none is empty.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.last = {text[-1] for text in stop}
        self.always = any(character.isspace() for character in self.last)
        window = 4 * max(map(len, stop)) + 4  # a character may take four tokens
        self.tails: defaultdict[int, deque[int]] = defaultdict(lambda: deque(maxlen=window))
        """Last tokens of each row."""
        self.completes: dict[int, bool] = {}
        """Whether a token may complete a string, for those that have been met."""
        self.rows: list[int] = []
        """Rows that have ended by a string."""

    def hit(self, rows: Sequence[int], tokens: Sequence[int]) -> list[bool]:
        """Whether the text of each of ``rows`` contains a string, now that it has the next of ``tokens``."""
        for row, token in zip(rows, tokens, strict=True):
            self.tails[row].append(token)
        self._meet(tokens)
        looked = [row for row, token in zip(rows, tokens, strict=True) if self.completes[token]]
        texts = self.tokenizer.batch_decode([list(self.tails[row]) for row in looked]) if looked else []
        found = {row for row, text in zip(looked, texts, strict=True) if any(string in text for string in self.stop)}
        self.rows.extend(found)
        return [row in found for row in rows]

    def _meet(self, tokens: Sequence[int]) -> None:
        """Learn of tokens that have not been met whether they may complete a string."""
        if new := list(set(tokens).difference(self.completes)):
            texts = [""] * len(new) if self.always else self.tokenizer.batch_decode([[token] for token in new])
            for token, text in zip(new, texts, strict=True):
                self.completes[token] = not text or UNFINISHED in text or not self.last.isdisjoint(text)
