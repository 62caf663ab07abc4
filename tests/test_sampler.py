"""One draw per row: frequencies, log-probabilities, entropies, truncation, and the laws of the inverse CDF."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from lit_rlvr.engines import sampler
from lit_rlvr.engines.base import Sampling
from lit_rlvr.engines.sampler import BLOCK, draw, inverse_cdf
from lit_rlvr.hashing import uniform

LAWS = settings(max_examples=50, deadline=None, derandomize=True)
VOCABULARY = 2 * BLOCK + 90
"""Two whole blocks and a part of a third."""
BELOW_ONE = 1 - 2.0**-53


def random_logits(rows: int, vocabulary: int = VOCABULARY, seed: int = 0) -> Tensor:
    """Logits [rows, vocabulary] with a spread of 2 nats."""
    return 2 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


def grid(n: int) -> Tensor:
    """The middles of n equal parts of [0, 1): a token of probability p is hit n p times, give or take one."""
    return (torch.arange(n, dtype=torch.float64) + 0.5) / n


def frequencies(logits: Tensor, sampling: Sampling, n: int = 4000) -> Tensor:
    """Share of each token among n draws from one row of logits [V], at evenly spaced uniforms."""
    token = draw(logits.expand(n, -1), sampling, grid(n)).token
    return torch.bincount(token, minlength=len(logits)).double() / n


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_chi_square_of_frequencies(temperature: float) -> None:
    """10,000 draws with the engine's own random numbers; tokens of less than 5 expected draws share a cell.

    The statistic has mean k and variance 2 k; five standard deviations.
    """
    n = 10_000
    logits = random_logits(1)
    token = draw(logits.expand(n, -1), Sampling(temperature), uniform(3, 1, 2, torch.arange(n), 0)).token
    counts = torch.bincount(token, minlength=VOCABULARY).double()
    expected = n * torch.softmax(logits[0].double() / temperature, -1)
    often = expected >= 5
    counts, expected = (torch.cat([x[often], x[~often].sum()[None]]) for x in (counts, expected))
    k = len(counts) - 1
    assert k > 10
    assert float(((counts - expected) ** 2 / expected).sum()) < k + 5 * math.sqrt(2 * k)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_every_token_gets_its_share(temperature: float) -> None:
    """Over evenly spaced uniforms each of the tokens of all blocks is drawn n p times, within one."""
    p = torch.softmax(random_logits(1)[0].double() / temperature, -1)
    # float32 probabilities shift the edges of a token's interval by less than 1e-6 of the total, 0.004 draws.
    assert float((frequencies(random_logits(1)[0], Sampling(temperature)) - p).abs().max()) < 1.01 / 4000


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
@pytest.mark.parametrize("vocabulary", [50, VOCABULARY, 20_000])
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_logprob_and_entropy_are_those_of_the_full_distribution(
    temperature: float, vocabulary: int, offset: float
) -> None:
    """Against float64, wherever the logits' zero lies."""
    logits = random_logits(6, vocabulary) + offset
    got = draw(logits, Sampling(temperature), grid(6))
    logp = torch.log_softmax(logits.double() / temperature, -1)
    assert_close(got.logprob, logp.gather(1, got.token[:, None])[:, 0].float())
    assert_close(got.entropy, -(logp.exp() * logp).sum(-1).float())


def test_greedy_takes_the_maximum_and_reports_at_temperature_one() -> None:
    """The uniforms are not used."""
    logits = random_logits(5)
    got = draw(logits, Sampling(temperature=0), torch.full((5,), math.nan, dtype=torch.float64))
    logp = torch.log_softmax(logits.double(), -1)
    assert got.token.tolist() == logits.argmax(-1).tolist()
    assert_close(got.logprob, logp.max(-1).values.float())
    assert_close(got.entropy, -(logp.exp() * logp).sum(-1).float())


def nucleus(p: Tensor, top_p: float, top_k: int) -> list[int]:
    """The kept tokens: the k most likely, then the shortest prefix of those that reaches top_p of their sum."""
    ordered = sorted(range(len(p)), key=lambda i: -float(p[i]))[: top_k or len(p)]
    total, reached, kept = sum(float(p[i]) for i in ordered), 0.0, []
    for i in ordered:
        if reached >= top_p * total:
            break
        kept.append(i)
        reached += float(p[i])
    return kept


@pytest.mark.parametrize(
    ("top_p", "top_k"), [(1.0, 1), (1.0, 7), (1.0, 300), (1.0, 10**6), (0.05, 0), (0.5, 0), (0.9, 0), (0.5, 20)]
)
def test_truncation(top_p: float, top_k: int) -> None:
    """The right tokens are left, in their old proportions, while log-probability and entropy stay whole."""
    logits, temperature = random_logits(1)[0], 0.8
    sampling = Sampling(temperature, top_p=top_p, top_k=top_k)
    p = torch.softmax(logits.double() / temperature, -1)
    kept = torch.tensor(nucleus(p, top_p, top_k))
    wanted = torch.zeros_like(p)
    wanted[kept] = p[kept] / p[kept].sum()
    got = frequencies(logits, sampling)
    assert float((got - wanted).abs().max()) < 1.01 / 4000
    assert not got[wanted == 0].any()
    cut, whole = (draw(logits.expand(3, -1), s, grid(3)) for s in (sampling, Sampling(temperature)))
    assert_close(cut.logprob, p.log()[cut.token].float())
    assert torch.equal(cut.entropy, whole.entropy)


@pytest.mark.parametrize(
    ("top_p", "top_k", "kept"),
    [(0.49, 0, 1), (0.51, 0, 2), (0.79, 0, 2), (0.81, 0, 3), (0.96, 0, 4), (1.0, 2, 2), (0.6, 2, 1), (0.64, 2, 2)],
)
def test_truncation_by_hand(top_p: float, top_k: int, kept: int) -> None:
    """Probabilities .05 .15 .3 .5; two of them, renormalised, are .625 and .375."""
    got = frequencies(torch.tensor([0.05, 0.15, 0.3, 0.5]).log(), Sampling(top_p=top_p, top_k=top_k), n=100)
    assert got.nonzero().squeeze(1).tolist() == list(range(4 - kept, 4))


def test_top_p_stops_where_it_is_reached_exactly() -> None:
    """Half of the mass is in the first token; asking for half needs no second."""
    logits = torch.tensor([2.0, 1.0, 1.0]).log()
    assert frequencies(logits, Sampling(top_p=0.5), n=10).tolist() == [1.0, 0.0, 0.0]


def test_equally_likely_tokens_survive_top_k_together() -> None:
    """Like Hugging Face: ties with the k-th are kept."""
    assert frequencies(torch.tensor([1.0, 2.0, 2.0, 0.0]), Sampling(top_k=1), n=10).tolist() == [0.0, 0.5, 0.5, 0.0]


@pytest.mark.parametrize("more", [{}, {"top_k": 3}, {"top_p": 0.9}, {"temperature": 0.3}, {"temperature": 0.0}])
def test_masked_logits_are_never_drawn(more: dict[str, Any]) -> None:
    """-inf at both ends and in the middle: no draw at either end of the uniforms, and finite, right numbers."""
    logits = random_logits(1)[0]
    logits[:BLOCK] = logits[300:320] = logits[-100:] = -math.inf
    edges = torch.tensor([0.0, 2.0**-60, 0.5, BELOW_ONE], dtype=torch.float64)
    got = draw(logits.expand(4, -1), Sampling(**more), edges)
    temperature = more.get("temperature") or 1.0
    logp = torch.log_softmax(logits.double() / temperature, -1)
    assert bool(torch.isfinite(logits[got.token]).all())
    assert_close(got.logprob, logp[got.token].float())
    finite = logp[torch.isfinite(logp)]
    assert_close(got.entropy, -(finite.exp() * finite).sum().float().expand(4))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.7])
def test_broken_logits_are_told(bad: float, temperature: float) -> None:
    """One NaN or infinity is enough; so is a row without a finite logit. What is drawn there is some token."""
    logits = random_logits(3)
    assert draw(logits, Sampling(temperature), grid(3)).finite.all()
    for broken in (slice(7, 8), slice(None)):
        logits[1, broken] = bad if broken.stop else -math.inf
        token, _, _, finite = draw(logits, Sampling(temperature), grid(3))
        assert finite.tolist() == [True, False, True]
        assert 0 <= token.min() <= token.max() < VOCABULARY


def test_autocast_rounds_nothing() -> None:
    """Scalar products, which it would take in bfloat16, are what entropies are made of."""
    logits = random_logits(5)
    wanted = draw(logits, Sampling(), grid(5))
    with torch.autocast("cpu", torch.bfloat16):
        got = draw(logits, Sampling(), grid(5))
    assert all(torch.equal(*pair) for pair in zip(got, wanted, strict=True))


@pytest.mark.parametrize("masked", [False, True])
def test_numbers_that_are_not_looked_at(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where looking would wait: the same, whether logits of minus infinity have to be lifted or not."""
    logits = random_logits(5)
    if masked:
        logits[1, ::2] = -math.inf
    wanted = draw(logits, Sampling(), grid(5))
    monkeypatch.setattr(sampler, "READABLE", ())
    assert all(torch.equal(*pair) for pair in zip(draw(logits, Sampling(), grid(5)), wanted, strict=True))


integer_masses = st.lists(st.sampled_from([0, 0, 1, 3, 1000]), min_size=1, max_size=3).flatmap(
    lambda head: st.tuples(st.just(head), st.integers(0, 2 * BLOCK), st.lists(st.integers(0, 5), max_size=5))
)
"""Some masses, a run of zeros that may span blocks, and some more."""


@given(integer_masses, st.integers(0, 2**20 - 1))
@LAWS
def test_inverse_cdf_is_the_first_index_whose_sum_passes(parts: tuple[list[int], int, list[int]], step: int) -> None:
    """Exact in fractions: whole masses and multiples of 2^-20 leave nothing to round."""
    masses = parts[0] + [0] * parts[1] + parts[2] + [1]
    goal, reached, wanted = Fraction(step, 2**20) * sum(masses), 0, 0
    while (reached := reached + masses[wanted]) <= goal:
        wanted += 1
    p = torch.tensor([masses], dtype=torch.float32)
    assert inverse_cdf(p, torch.tensor([step * 2.0**-20], dtype=torch.float64)).tolist() == [wanted]


@given(integer_masses, st.floats(0, BELOW_ONE), st.floats(0, BELOW_ONE), st.integers(-60, 60))
@LAWS
def test_inverse_cdf_laws(parts: tuple[list[int], int, list[int]], u: float, v: float, power: int) -> None:
    """Never a token without mass; growing with the uniform; blind to the scale of p; rows do not mix."""
    p = torch.tensor([parts[0] + [0] * parts[1] + parts[2] + [1] + [0] * 40], dtype=torch.float32)
    low, high = sorted((u, v))
    uniforms = torch.tensor([low, high, BELOW_ONE, 0.0], dtype=torch.float64)
    got = inverse_cdf(p.expand(4, -1), uniforms)
    assert bool((p[0, got] > 0).all())
    assert int(got[3]) <= int(got[0]) <= int(got[1]) <= int(got[2])
    massive = p[0].nonzero().squeeze(1)
    assert (int(got[3]), int(got[2])) == (int(massive[0]), int(massive[-1]))
    assert torch.equal(inverse_cdf((p * 2.0**power).expand(4, -1), uniforms), got)
    assert torch.equal(inverse_cdf(p, uniforms[:1]), got[:1])


def test_no_uniform_rounds_into_a_token_without_mass() -> None:
    """The largest uniform, and masses whose float64 sums round: the last drawn token is the last that has mass."""
    p = torch.rand(200, VOCABULARY, generator=torch.Generator().manual_seed(0)) ** 20
    last = torch.arange(200) + 300
    p[torch.arange(VOCABULARY) > last[:, None]] = 0.0
    got = inverse_cdf(p, torch.full((200,), BELOW_ONE, dtype=torch.float64))
    assert bool((p.gather(1, got[:, None]) > 0).all())
    assert bool((got <= last).all())


def test_the_tail_of_a_large_vocabulary_is_reached() -> None:
    """100,000 tokens of 2^-30 behind one of mass 1: a float32 running sum would never leave the first."""
    tail, unit = 100_000, 2.0**-30
    p = torch.full((1, 1 + tail), unit)
    p[0, 0] = 1.0
    for wanted in (0, 1, 50_000, tail):
        middle = (0.5 if wanted == 0 else 1 + (wanted - 0.5) * unit) / (1 + tail * unit)
        assert inverse_cdf(p, torch.tensor([middle], dtype=torch.float64)).tolist() == [wanted]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -0.1}, "temperature must be >= 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\]"),
        ({"top_p": 1.1}, r"top_p must lie in \(0, 1\]"),
        ({"top_k": -1}, "top_k must be >= 0"),
        ({"stop": ["a", ""]}, "empty stop string"),
    ],
)
def test_sampling_is_checked(arguments: dict[str, Any], message: str) -> None:
    """Each number out of range is named."""
    with pytest.raises(ValueError, match=message):
        Sampling(**arguments)


@pytest.mark.parametrize(
    ("arguments", "truncates"),
    [
        ({}, False),
        ({"temperature": 0.5}, False),
        ({"temperature": 0}, True),
        ({"top_p": 0.9}, True),
        ({"top_k": 5}, True),
    ],
)
def test_what_counts_as_truncation(arguments: dict[str, Any], truncates: bool) -> None:
    """Greedy is one kind of it; a temperature is none."""
    assert Sampling(**arguments).truncates is truncates


@pytest.mark.parametrize("more", [{}, {"temperature": 0.6}, {"temperature": 0.0}, {"top_p": 0.7}, {"top_k": 9}])
def test_rows_in_parts_draw_what_they_draw_alone(more: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Many rows of a large vocabulary are taken a few at a time; rows do not mix, and none is lost."""
    logits, uniforms = random_logits(11), grid(11)
    monkeypatch.setattr(sampler, "CACHED", 3 * VOCABULARY + 5)
    got = draw(logits, Sampling(**more), uniforms)
    monkeypatch.setattr(sampler, "CACHED", 11 * VOCABULARY)
    wanted = draw(logits, Sampling(**more), uniforms)
    assert torch.equal(got.token, wanted.token)
    assert_close(got.logprob, wanted.logprob)
    assert_close(got.entropy, wanted.entropy)
