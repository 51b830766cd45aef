"""Random words depend on the key and the position, and on nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from streammerge.rng import (
    LANES_PER_COUNTER,
    keep_limit,
    keep_mask,
    philox_block,
    random_lanes,
    stream_key,
)

KEY = 0x0123456789ABCDEF_FEDCBA9876543210
LANES = (
    # The first two counters.
    (
        0x7E44,
        0x9755,
        0x6F3D,
        0x4A9F,
        0x0D3D,
        0x03D0,
        0x3154,
        0xBB94,
        0x5219,
        0x789D,
        0x8127,
        0xAB99,
        0xDF2A,
        0xA2A0,
        0x1346,
        0x7937,
    ),
    (
        0xC579,
        0x5BE0,
        0x8F21,
        0x5EA3,
        0xA0CB,
        0x1507,
        0x2F1B,
        0x8928,
        0x772A,
        0x17DF,
        0x89BE,
        0x9D8B,
        0x5AFE,
        0x7A44,
        0xC343,
        0xFFFB,
    ),
)


def numbers(key: int, start: int, count: int) -> NDArray[np.uint64]:
    """Return every element's whole 32-bit number, drawn plainly from both streams."""
    upper = random_lanes(key, start, count).astype(np.uint64)
    return upper * 2**16 + random_lanes(key ^ 1, start, count)


def test_lanes_are_these_numbers() -> None:
    """A recipe's masks must never change, whatever happens to numpy."""
    assert tuple(random_lanes(KEY, 0, 16).tolist()) == LANES[0]
    assert tuple(random_lanes(KEY, 16, 16).tolist()) == LANES[1]


def test_lanes_are_those_of_numpys_generator() -> None:
    wide = np.random.Philox(key=KEY).random_raw(500)

    assert random_lanes(KEY, 0, 2000).tolist() == [
        word >> shift & 0xFFFF for word in wide.tolist() for shift in (0, 16, 32, 48)
    ]


def published_lanes(key: int, counter: int) -> list[int]:
    """Return the sixteen lanes of one counter, from the paper's definition of Philox 4x64-10."""
    mask = 2**64 - 1
    multipliers = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
    bumps = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
    keys = [key & mask, key >> 64]
    x = [counter >> (64 * index) & mask for index in range(4)]
    for _ in range(10):
        product0, product1 = multipliers[0] * x[0], multipliers[1] * x[2]
        x = [
            (product1 >> 64) ^ x[1] ^ keys[0],
            product1 & mask,
            (product0 >> 64) ^ x[3] ^ keys[1],
            product0 & mask,
        ]
        keys = [(k + bump) & mask for k, bump in zip(keys, bumps, strict=True)]
    return [word >> shift & 0xFFFF for word in x for shift in (0, 16, 32, 48)]


@pytest.mark.parametrize("block", [0, 1, 12_345, 2**40])
def test_lanes_are_those_of_the_published_algorithm(block: int) -> None:
    lanes = random_lanes(KEY, block * LANES_PER_COUNTER, LANES_PER_COUNTER)

    assert lanes.tolist() == published_lanes(KEY, block + 1)


@settings(deadline=None)
@given(
    key=st.integers(0, 2**128 - 1),
    first=st.integers(0, 2**40),
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=6),
    tail=st.integers(0, 20),
)
def test_any_split_gives_the_same_lanes(
    key: int, first: int, lengths: list[int], tail: int
) -> None:
    start = first * LANES_PER_COUNTER
    count = sum(lengths) * LANES_PER_COUNTER + tail
    whole = random_lanes(key, start, count)
    parts, at = [], start
    for length in lengths:
        parts.append(random_lanes(key, at, length * LANES_PER_COUNTER))
        at += length * LANES_PER_COUNTER
    parts.append(random_lanes(key, at, tail))

    assert whole.dtype == np.uint16
    assert np.concatenate(parts).tolist() == whole.tolist()


@pytest.mark.parametrize("start", [1, 8, 15, 16, 2**40 + 3])
def test_lanes_may_start_anywhere(start: int) -> None:
    begin = start // LANES_PER_COUNTER * LANES_PER_COUNTER
    whole = random_lanes(KEY, begin, start - begin + 40)

    assert random_lanes(KEY, start, 40).tolist() == whole[start - begin :].tolist()


@pytest.mark.parametrize("density", [1e-4, 0.1, 0.5, 0.9, 0.9999])
def test_the_keep_rate_is_the_density(density: float) -> None:
    count = 2**20
    for name in ("a", "b"):
        kept = int(keep_mask(stream_key(1, 0, name), 0, count, density).sum())
        # Five standard deviations of a binomial count.
        assert abs(kept - count * density) < 5 * (count * density * (1 - density)) ** 0.5


def test_the_ends_of_the_keep_rate_are_exact() -> None:
    assert [keep_limit(each) for each in (0.0, 2**-32, 0.5, 1.0)] == [0, 1, 2**31, 2**32]
    assert keep_mask(KEY, 0, 10_000, 1.0).all()
    assert not keep_mask(KEY, 0, 10_000, 0.0).any()


@pytest.mark.parametrize("density", [0.3, 0.5, 1 / 3, 2**-16, 3 * 2**-17, 1 - 2**-32])
def test_a_mask_says_which_numbers_lie_below_the_density(density: float) -> None:
    """The short way, which seldom draws the second stream, equals comparing whole numbers."""
    count = 400_000

    expected = numbers(KEY, 16, count) < round(density * 2**32)

    assert (keep_mask(KEY, 16, count, density) == expected).all()


def test_a_larger_density_keeps_all_that_a_smaller_one_keeps() -> None:
    few, many = keep_mask(KEY, 0, 5000, 0.3), keep_mask(KEY, 0, 5000, 0.31)

    assert (few <= many).all()


def test_every_seed_source_and_name_has_its_own_stream() -> None:
    keys = {
        stream_key(seed, source, name)
        for seed in (0, 1, 256, 2**64 - 1)
        for source in (0, 1, 255, 256)
        for name in ("", "w", "w.0", "w.1", "0.w", "ü", "權")
    }

    assert len(keys) == 4 * 4 * 7
    assert all(0 <= key < 2**128 for key in keys)


def test_streams_of_different_keys_are_unrelated() -> None:
    count = 2**16
    first, second = (keep_mask(stream_key(0, s, "w"), 0, count, 0.5) for s in (0, 1))

    # Agreement of two fair coins: five standard deviations around one half.
    assert abs(int((first == second).sum()) - count / 2) < 5 * (count / 4) ** 0.5


def test_keys_are_these_numbers() -> None:
    """A recipe's masks must not change with a release."""
    assert stream_key(0, 0, "weight") == 0x9AE473DE8AC4D0CB_C38FF332A8B6F680


@settings(max_examples=200)
@given(key=st.integers(0, 2**128 - 1), counter=st.integers(0, 2**64 - 2))
def test_a_single_block_is_what_numpy_draws(key: int, counter: int) -> None:
    drawn = np.random.Philox(key=key, counter=counter).random_raw(4)
    assert philox_block(key, counter + 1) == tuple(drawn.tolist())
