"""The exact k-th largest magnitude of a scope that is one block, at once.

The plain way for what :class:`~streammerge.reductions.magnitude.MagnitudeSearch` finds in rounds;
models of many small tensors would spend most of their time in keeping its books.

Memory: a copy of the block.
"""

from __future__ import annotations

import numpy as np

from streammerge.reductions.topk import (
    Floats,
    TiePolicy,
    TopK,
    keep_everything,
    keep_nothing,
    kept_count,
    place_ties,
    ties_kept,
)

_GUESS_SAMPLE = 512
"""Elements of a tensor of one block that its threshold is guessed from."""
_GUESSES = 3
"""Each costs two comparisons per element; a partition of equal numbers costs as much as eight."""


def select_block(magnitudes: Floats, density: float, tie_policy: TiePolicy) -> TopK:
    """Return the statistic of a scope that is one block, at once.

    The plain way for what :class:`MagnitudeSearch` finds in rounds; models of many small tensors
    would spend most of their time in keeping its books.

    Args:
        magnitudes: ``[m]`` absolute values.
        density: Fraction kept, in [0, 1].
        tie_policy: Which ties are kept.
    """
    numel = magnitudes.size
    k = kept_count(density, numel)
    if density >= 1 or numel == 0:
        return keep_everything(numel)
    if k == 0:
        return keep_nothing(numel)
    found_at = _guess_kth(magnitudes, k) or _kth_by_partition(magnitudes, k)
    if found_at is None:
        return TopK(float("inf"), numel, int(np.count_nonzero(np.isnan(magnitudes))), 0, 0, -1, 0)
    threshold, greater, equal = found_at
    kept = ties_kept(tie_policy, k - greater, equal)
    found = TopK(threshold, numel, greater, equal, kept, -1, 0)
    return place_ties(found, np.array([equal], dtype=np.int32))


def _kth_by_partition(magnitudes: Floats, k: int) -> tuple[float, int, int] | None:
    """Return the k-th largest magnitude, how many are larger and how many equal; None for NaN."""
    numel = magnitudes.size
    # partition ranks NaN above everything, as the search does.
    threshold = float(np.partition(magnitudes, numel - k)[numel - k])
    if threshold != threshold:  # noqa: PLR0124 - only NaN differs from itself
        return None
    greater = numel - int(np.count_nonzero(magnitudes <= threshold))
    return threshold, greater, int(np.count_nonzero(magnitudes == threshold))


def _guess_kth(magnitudes: Floats, k: int) -> tuple[float, int, int] | None:
    """Return the same by guessing from a sample; None unless a guess is exactly right.

    Differences of bfloat16 models have few distinct magnitudes, which is where guesses hit and
    where a partition, among so many equal numbers, takes several times longer.
    """
    numel = magnitudes.size
    sample = np.sort(magnitudes[:: max(1, numel // _GUESS_SAMPLE)])
    index = min(sample.size - 1, int(sample.size * (1 - k / numel)))
    tried_above = tried_below = False
    for _ in range(_GUESSES):
        guess = sample[index]
        greater = numel - int(np.count_nonzero(magnitudes <= guess))
        if greater >= k:
            index = int(np.searchsorted(sample, guess, "right"))
            tried_above = True
        else:
            equal = int(np.count_nonzero(magnitudes == guess))
            if greater + equal >= k:
                return float(guess), greater, equal
            index = int(np.searchsorted(sample, guess)) - 1
            tried_below = True
        # Between two neighbours of the sample lies nothing more to guess.
        if (tried_above and tried_below) or not 0 <= index < sample.size:
            return None
    return None
