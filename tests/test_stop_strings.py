"""Stop strings against decoding every row after every token, with tokenizers of each kind."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tape import Looks
from tiny_models import char_tokenizer
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from lit_rlvr.engines import Sampling
from lit_rlvr.engines.decoding import Output
from lit_rlvr.engines.stop_strings import StopStrings

LAWS = settings(max_examples=60, deadline=None, derandomize=True)
PIECES = ["a", "b", " a", " ", ">", "</", "ab>", "a b", "\n", "\n\n", "b\n", "\u00e9", "b\u00e9a", ".", " ."]
"""Texts of tokens; the bytes of ``\u00e9`` are tokens too."""
STRINGS = ["ab", "</a>", ">", "a b", "b ", "\n", "a\n\n", "\n\nb", "\u00e9", "a\u00e9", "\u00e9b", "."]


def fast(vocabulary: list[str], decoder: Any, **more: Any) -> PreTrainedTokenizerFast:
    """A tokenizer that only decodes."""
    make: Callable[..., PreTrainedTokenizerFast] = PreTrainedTokenizerFast
    inner = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(vocabulary)}, unk_token="a"))
    inner.decoder = decoder
    return make(tokenizer_object=inner, **more)


@cache
def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """Of bytes as GPT-2's, of pieces as SentencePiece's, of words as BERT's, or of characters."""
    if kind == "bytes":
        shown = {" ": "\u0120", "\n": "\u010a", "\u00e9": "\u00c3\u00a9"}
        pieces = ["".join(shown.get(character, character) for character in piece) for piece in PIECES]
        return fast([*pieces, "\u00c3", "\u00a9", "\u00a9a"], decoders.ByteLevel())
    if kind == "pieces":
        steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        return fast(
            [*(piece.replace(" ", "\u2581") for piece in PIECES), "<0xC3>", "<0xA9>", "<0x0A>"],
            decoders.Sequence(steps),
        )
    if kind == "words":
        words = ["a", "##b", "b", "##a", ">", "</", "\u00e9", ".", "##\u00e9", "'", "n"]
        return fast(words, decoders.WordPiece(), clean_up_tokenization_spaces=True)
    return char_tokenizer()


class Counted:
    """A tokenizer that counts the tokens that it decodes.

    Args:
        inner: The tokenizer.
    """

    def __init__(self, inner: Any) -> None:
        self.inner, self.decoded = inner, 0

    def batch_decode(self, ids: list[list[int]]) -> list[str]:
        """Decode rows."""
        self.decoded += sum(map(len, ids))
        texts: list[str] = self.inner.batch_decode(ids)
        return texts


@LAWS
@given(
    kind=st.sampled_from(["bytes", "pieces", "words", "characters"]),
    stop=st.lists(st.sampled_from(STRINGS), min_size=1, max_size=3, unique=True),
    data=st.data(),
)
def test_the_same_as_decoding_everything(kind: str, stop: list[str], data: st.DataObject) -> None:
    """Each row hits at the very token at which its last tokens contain a string."""
    own = tokenizer(kind)
    token = st.integers(0, len(own) - 1)
    rows = data.draw(st.lists(st.lists(token, min_size=30, max_size=30), min_size=1, max_size=4))
    window = 4 * max(map(len, stop)) + 4
    strings, left = StopStrings(own, stop), list(range(len(rows)))
    for step in range(30):
        if not left:
            break
        texts = own.batch_decode([rows[row][max(0, step + 1 - window) : step + 1] for row in left])
        wanted = [any(string in text for string in stop) for text in texts]
        assert strings.hit(left, [rows[row][step] for row in left]) == wanted
        left = [row for row, hit in zip(left, wanted, strict=True) if not hit]
    assert sorted(strings.rows) == [row for row in range(len(rows)) if row not in left]


def test_most_tokens_are_decoded_once() -> None:
    """Those without the last character of a string, on their own; where that is a line's end, all are."""
    for stop in ("</a>", "a\n"):
        counted = Counted(char_tokenizer())
        strings = StopStrings(counted, [stop])
        generator = torch.Generator().manual_seed(0)
        for tokens in torch.randint(2, 50, (100, 8), generator=generator).tolist():
            assert not any(strings.hit(range(8), tokens))
        assert counted.decoded < 500 if stop == "</a>" else counted.decoded > 9_000


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("stop", [[], ["?"], ["zz", "\n"]])
def test_one_read_per_draw(stop: list[str]) -> None:
    """Whatever the CPU has to know is read at once, and nothing is sent back."""
    uid = torch.tensor([(0, draw, 0) for draw in range(6)])
    out = Output(char_tokenizer(), torch.tensor([1]), uid, Sampling(max_new_tokens=9, stop=stop), 3)
    logits = torch.zeros(6, 50)
    with Looks() as looks:
        for _ in range(3):
            out.draw(logits, torch.arange(6))
    assert looks.found == ["tolist"] * 3
