"""What has to go through the layers: expected numbers, in closed form, where the tokens that learn are drawn at random.

Exactly ceil(rho n) of a step's n response tokens learn. Attention looks back only, so that nothing that stands behind
the state which predicts a response's last chosen token is needed; see ``lit_rlvr.microbatch.enters``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from benchmarks.models import Size


@dataclass(frozen=True)
class Entering:
    """Tokens of a pass through the model.

    Args:
        tokens: Those that go through the layers.
        pairs: Pairs of which one attends to the other, itself by half, in each layer.
        read: Those whose state the last layer has to give.
        read_pairs: Pairs whose first is one of those.
    """

    tokens: float
    pairs: float
    read: float
    read_pairs: float


def chosen(size: Size, rho: float) -> int:
    """Response tokens of a step that learn."""
    return math.ceil(rho * size.rows * size.new_tokens)


def none_of(marked: int, total: int, drawn: int) -> float:
    """Probability that none of ``marked`` things is among ``drawn`` of ``total``, all draws being equally likely.

    >>> round(none_of(1, 10, 3), 9), none_of(8, 10, 3)
    (0.7, 0.0)
    """
    if marked > total - drawn:
        return 0.0
    log = math.lgamma(total - marked + 1) - math.lgamma(total - marked - drawn + 1)
    log += math.lgamma(total - drawn + 1) - math.lgamma(total + 1)
    return math.exp(log)


def every_token(size: Size) -> Entering:
    """Each response with a prompt of its own, whatever learns; only the last token of a response predicts nothing."""
    prompt, new = size.prompt_tokens, size.new_tokens - 1
    tokens, pairs = size.rows * (prompt + new), size.rows * (prompt + new) ** 2 / 2
    return Entering(tokens, pairs, tokens, pairs)


def sampled(size: Size) -> Entering:
    """Reading each prompt once, for the state of its last token, and every token that is sampled but the last."""
    prompt, new = size.prompt_tokens, size.new_tokens - 1
    responses = size.rows * (new * prompt + new**2 / 2)
    return Entering(
        tokens=size.prompts * prompt + size.rows * new,
        pairs=size.prompts * prompt**2 / 2 + responses,
        read=size.prompts + size.rows * new,
        read_pairs=size.prompts * (prompt - 0.5) + responses,
    )


def least(size: Size, rho: float) -> Entering:
    """What training cannot do without: prompts once, what a chosen token comes after, and states that are read.

    A response whose last chosen token is number c (from 0) enters with c tokens, of which the prompt's last and the
    first c - 1 may be read. c >= p means that one of the tokens from p on is chosen.
    """
    prompt, new, drawn = size.prompt_tokens, size.new_tokens, chosen(size, rho)
    total = size.rows * new
    reaches = [1 - none_of(new - p, total, drawn) for p in range(1, new)]  # that c >= p
    length = sum(reaches)
    square = sum((2 * p - 1) * reach for p, reach in enumerate(reaches, 1))
    prompts = size.prompts * (1 - none_of(size.responses * new, total, drawn))
    first = size.prompts * (1 - none_of(size.responses, total, drawn))  # prompts whose last state is read
    each = size.rows * drawn / total
    return Entering(
        tokens=prompts * prompt + size.rows * length,
        pairs=prompts * prompt**2 / 2 + size.rows * (length * prompt + square / 2),
        read=first + each * (new - 1),
        read_pairs=first * (prompt - 0.5) + each * sum(prompt + c - 0.5 for c in range(1, new)),
    )
