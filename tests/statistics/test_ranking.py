"""The element of a rank equals that of a sorted copy, wherever a sample points."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streammerge.statistics import ranking
from streammerge.statistics.ranking import select_rank, select_rank_plainly

NUMEL = 3 * ranking._LEAST_NUMEL + 17
Make = Callable[[np.random.Generator], np.ndarray]

SHAPES: dict[str, Make] = {
    "all different": lambda rng: np.abs(rng.standard_normal(NUMEL)),
    "few values": lambda rng: rng.integers(0, 7, NUMEL) / 8,
    "one value": lambda rng: np.full(NUMEL, 0.25) * rng.integers(1, 3),
    "one value and some": lambda rng: np.where(rng.random(NUMEL) < 0.9, 0.5, rng.random(NUMEL)),
    "ascending": lambda rng: np.sort(rng.random(NUMEL)),
    "infinite": lambda rng: np.where(rng.random(NUMEL) < 0.3, np.inf, rng.random(NUMEL)),
    "NaN": lambda rng: np.where(rng.random(NUMEL) < 0.3, np.nan, rng.random(NUMEL)),
    # Every element that is sampled is large, all others are small.
    "misleading": lambda rng: np.where(
        np.arange(NUMEL) % ranking._NUMEL_PER_SAMPLED == 0, 9 + rng.random(NUMEL), rng.random(NUMEL)
    ),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", SHAPES)
@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**32), share=st.floats(0, 1))
def test_rank_equals_that_of_a_sorted_copy(
    shape: str, dtype: type, seed: int, share: float
) -> None:
    values = SHAPES[shape](np.random.default_rng(seed)).astype(dtype)
    rank = min(values.size - 1, int(share * values.size))
    before = values.copy()
    spare = np.empty(values.size + 5, dtype=dtype)
    expected = np.sort(values)[rank]
    np.testing.assert_equal(select_rank(values, rank, spare), expected)
    np.testing.assert_equal(select_rank_plainly(values, rank, spare), expected)
    np.testing.assert_array_equal(values, before)


@pytest.mark.parametrize("numel", [1, 2, 63, ranking._LEAST_NUMEL, ranking._LEAST_NUMEL + 1])
def test_every_size_is_selected_from(numel: int) -> None:
    values = np.random.default_rng(numel).random(numel, dtype=np.float32)
    ordered = np.sort(values)
    spare = np.empty_like(values)
    for rank in {0, numel // 2, numel - 1}:
        assert select_rank(values, rank, spare) == ordered[rank]


def test_a_sample_that_tells_saves_the_partition(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).random(2**20, dtype=np.float32)
    spare = np.empty_like(values)
    partitioned = []
    plainly = ranking.select_rank_plainly

    def watched(values: np.ndarray, rank: int, spare: np.ndarray) -> np.floating:
        partitioned.append(values.size)
        return plainly(values, rank, spare)

    monkeypatch.setattr(ranking, "select_rank_plainly", watched)
    # More than one block, so that what is below and between adds up over them.
    assert select_rank(values, 2**18, spare) == np.sort(values)[2**18]
    assert len(partitioned) == 1
    assert partitioned[0] < values.size // 10


@pytest.mark.parametrize("off", range(-2, 3))
@pytest.mark.parametrize("side", ["low", "high"])
def test_a_rank_beside_what_lies_between_the_guesses_is_found(side: str, off: int) -> None:
    """The sample sees the middle alone; so many lie below it that the rank is at one of its ends."""
    numel, rank = ranking._LEAST_NUMEL, 5000
    step = ranking._NUMEL_PER_SAMPLED
    middle = np.linspace(0.4, 0.6, numel // step)
    # Where the guesses lie in the sample, by the rank's share of it.
    place, share = rank / step, rank / numel
    slack = ranking._SIGMAS * (place * (1 - share)) ** 0.5 + 1
    guess = {"low": int(place - slack), "high": int(place + slack) + 1}[side]
    others = np.ones(numel - middle.size)
    others[: rank - guess + off] = 0.0
    values = np.empty(numel)
    sampled = np.arange(numel) % step == 0
    values[sampled], values[~sampled] = middle, others
    ordered = np.sort(values)

    assert ordered[rank] == middle[guess - off]
    assert select_rank(values, rank, np.empty_like(values)) == ordered[rank]
