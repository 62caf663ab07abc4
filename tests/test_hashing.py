"""Counter-based random numbers against SplitMix64 in plain Python, and against the uniform distribution."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lit_rlvr.hashing import hash_integers, uniform

WRAP = 1 << 64
GOLDEN, MIX1, MIX2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
INT64 = st.integers(-(2**63), 2**63 - 1)


def reference(*keys: int) -> int:
    """The hash in unsigned Python integers."""
    state = 0
    for key in keys:
        state = ((state ^ (key % WRAP)) + GOLDEN) % WRAP
        state = (state ^ (state >> 30)) * MIX1 % WRAP
        state = (state ^ (state >> 27)) * MIX2 % WRAP
        state ^= state >> 31
    return state


def unsigned(x: Tensor) -> list[int]:
    """The 64 bits of each element as a non-negative integer."""
    return [int(value) % WRAP for value in x.flatten().tolist()]


def unshift(x: int, bits: int) -> int:
    """Inverse of ``x ^ (x >> bits)``."""
    out = x
    for _ in range(64 // bits):
        out = x ^ (out >> bits)
    return out


def key_of(wanted: int) -> int:
    """The one key whose hash is ``wanted``: every step of the mixer is invertible."""
    state = unshift(wanted, 31) * pow(MIX2, -1, WRAP) % WRAP
    state = unshift(state, 27) * pow(MIX1, -1, WRAP) % WRAP
    return (unshift(state, 30) - GOLDEN) % WRAP


@pytest.mark.parametrize(
    ("seed", "outputs"),
    [
        (0, [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]),
        (1234567, [6457827717110365317, 3203168211198807973, 9817491932198370423]),
    ],
)
def test_one_key_gives_the_published_splitmix64_sequence(seed: int, outputs: list[int]) -> None:
    """The generator's n-th output is the hash of seed + n * golden; these outputs are its public test vectors."""
    assert [unsigned(hash_integers(seed + n * GOLDEN))[0] for n in range(len(outputs))] == outputs


def test_golden_value_of_a_rollout_key() -> None:
    """A run of another day draws the same numbers; the values come from ``reference``."""
    keys = (42, 3, 17, 5, 1023)
    assert unsigned(hash_integers(*keys)) == [reference(*keys)] == [0xF8A07AA9E6B22EC3]
    assert float(uniform(*keys)) == 0.9711987175748581


@given(st.lists(st.integers(-(2**70), 2**70), min_size=1, max_size=5))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_python_integers_equal_the_reference(keys: list[int]) -> None:
    """Any Python integer is taken modulo 2^64, negative ones included."""
    assert unsigned(hash_integers(*keys)) == [reference(*keys)]


@given(INT64, st.lists(INT64, min_size=1, max_size=4), st.lists(INT64, min_size=1, max_size=4))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_tensors_broadcast_to_the_reference(seed: int, rows: list[int], columns: list[int]) -> None:
    """Scalars, columns and rows of keys combine as in torch broadcasting."""
    got = hash_integers(seed, torch.tensor(rows)[:, None], torch.tensor(columns))
    assert got.shape == (len(rows), len(columns))
    assert unsigned(got) == [reference(seed, row, column) for row in rows for column in columns]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_narrow_integers_hash_like_wide_ones(dtype: torch.dtype) -> None:
    """The dtype in which a key arrives is no part of it."""
    keys = torch.tensor([0, 1, 77], dtype=dtype)
    assert torch.equal(hash_integers(5, keys), hash_integers(5, keys.long()))


def test_inputs_stay_as_they_are() -> None:
    """No key is written to."""
    key = torch.arange(4)
    hash_integers(key, key)
    assert torch.equal(key, torch.arange(4))


def test_order_and_number_of_keys_matter() -> None:
    """(1, 2), (2, 1), (1, 2, 0) and (0, 1, 2) are four different keys."""
    assert len({int(hash_integers(*keys)) for keys in ((1, 2), (2, 1), (1, 2, 0), (0, 1, 2))}) == 4


@pytest.mark.parametrize(
    ("bits", "expected"), [(0, 0.0), (WRAP - 1, 1 - 2.0**-53), (1 << 63, 0.5), ((1 << 63) - 1, 0.5 - 2.0**-53)]
)
def test_uniform_at_the_ends_of_its_range(bits: int, expected: float) -> None:
    """The 53 high bits, read as unsigned: all ones stay below 1 and the sign bit is worth one half."""
    assert reference(key_of(bits)) == bits
    assert float(uniform(key_of(bits))) == expected


@pytest.mark.parametrize("place", range(5))
def test_counting_in_any_key_gives_uniform_numbers(place: int) -> None:
    """Kolmogorov-Smirnov over 20,000 neighbours; 1.95 / sqrt(n) is the critical distance at 0.1 %."""
    n = 20_000
    keys: list[Tensor | int] = [-7, 1, 2, 3, 4]
    keys[place] = torch.arange(n)
    ordered = uniform(*keys).sort().values
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    distance = torch.maximum((steps[1:] - ordered).max(), (ordered - steps[:-1]).max())
    assert float(distance) < 1.95 / math.sqrt(n)


@pytest.mark.parametrize("place", range(3))
def test_neighbours_are_independent(place: int) -> None:
    """Chi-square of (u_n, u_n+1) on a 16 x 16 grid: 255 degrees of freedom, 330.5 is the 0.1 % point."""
    keys: list[Tensor | int] = [11, 12, 13]
    keys[place] = torch.arange(25_601)
    cells = (uniform(*keys) * 16).long()
    counts = torch.bincount(cells[:-1] * 16 + cells[1:], minlength=256).double()
    assert float(((counts - 100) ** 2 / 100).sum()) < 330.5


def test_every_input_bit_reaches_every_output_bit() -> None:
    """Flipping one bit of a key flips each output bit with probability one half (six sigma of 1,024 trials)."""
    base = torch.arange(1024)
    shifts = torch.arange(64)
    for bit in range(64):
        flipped = base ^ torch.tensor(1).bitwise_left_shift(torch.tensor(bit))
        changed = (hash_integers(9, base, 1) ^ hash_integers(9, flipped, 1))[:, None] >> shifts & 1
        assert float((changed.double().mean(0) - 0.5).abs().max()) < 6 * 0.5 / math.sqrt(1024)
