"""The element of a given rank among many numbers, for less than a partition of them takes.

A partition moves every number several times. Here a sorted sample tells between which two values
the element most likely lies; one sweep counts what is below and picks out what is between, a few
per cent, and only that is partitioned. Where the sample misleads, all is, as ever.

Memory: the caller's spare room, a sample of up to 64 Ki numbers, and one block's comparisons.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from streammerge.statistics import BLOCK
from streammerge.statistics.topk import Floats

_LEAST_NUMEL = 2**14
"""Fewer numbers are partitioned as they are."""
_NUMEL_PER_SAMPLED = 64
"""One in so many is sampled, up to the most: a sample costs as much as the sweep, or less."""
_MOST_SAMPLED = 2**16
_SIGMAS = 5.0
"""Half of the distance between the two values, in standard deviations of the sample's rank."""


def select_rank(values: Floats, rank: int, spare: Floats) -> Any:
    """Return what ``np.sort(values)[rank]`` would be; NaN ranks above everything.

    Args:
        values: ``[m]`` numbers, left as they are.
        rank: From 0, the smallest, to m - 1.
        spare: ``[>= m]`` of the same type; overwritten.
    """
    found = _select_between(values, rank, spare) if values.size >= _LEAST_NUMEL else None
    return select_rank_plainly(values, rank, spare) if found is None else found


def select_rank_plainly(values: Floats, rank: int, spare: Floats) -> Any:
    """Return what :func:`select_rank` returns, by a partition of all values."""
    spare = spare[: values.size]
    spare[:] = values
    spare.partition(rank)
    return spare[rank]


def _select_between(values: Floats, rank: int, spare: Floats) -> Any:
    """Return the element if it lies where the sample says; None otherwise."""
    step = max(_NUMEL_PER_SAMPLED, values.size // _MOST_SAMPLED)
    sample = np.sort(values[::step])
    share = rank / values.size
    middle = sample.size * share
    slack = _SIGMAS * (sample.size * share * (1 - share)) ** 0.5 + 1
    begin, end = int(middle - slack), int(middle + slack) + 1
    low = sample[begin] if begin >= 0 else sample.dtype.type(-np.inf)
    high = sample[end] if end < sample.size else sample.dtype.type(np.inf)
    below = inside = 0
    for start in range(0, values.size, BLOCK):
        block = values[start : start + BLOCK]
        # Comparisons with NaN are false: it is neither below nor between, as it should be.
        less = block < low
        below += int(np.count_nonzero(less))
        between = np.greater(block <= high, less, out=less)
        if low == high:
            # One value that very many share: to count is enough.
            inside += int(np.count_nonzero(between))
            continue
        picked = block[between]
        spare[inside : inside + picked.size] = picked
        inside += picked.size
    if not below <= rank < below + inside:
        return None
    if low == high:
        return low
    return select_rank_plainly(spare[:inside], rank - below, spare)
