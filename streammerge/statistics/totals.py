"""Totals of blocks, joined to totals of a scope.

Memory: nothing beside what it is given; a few numbers per block where sums pass the range of float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from streammerge.statistics.exact import NOT_FINITE, exact_sums, rounded
from streammerge.tiles.program import Op


def no_totals(kinds: Sequence[Op], blocks: int) -> NDArray[np.float64]:
    """Return the totals of blocks that have not answered, ``[blocks, totals]``."""
    return np.tile([-np.inf if kind is Op.LARGEST else 0.0 for kind in kinds], (blocks, 1))


def join_totals(kinds: Sequence[Op], of_blocks: NDArray[np.float64]) -> tuple[float, ...]:
    """Return the totals of a scope: sums with one rounding, whatever the number of blocks.

    Args:
        kinds: What each total is.
        of_blocks: ``[blocks, totals]``.
    """
    if not kinds:
        return ()
    return tuple(
        float(column.max(initial=-np.inf)) if kind is Op.LARGEST else _sum(column)
        for kind, column in zip(kinds, of_blocks.T, strict=True)
    )


def _sum(column: NDArray[np.float64]) -> float:
    try:
        return math.fsum(column)
    except (OverflowError, ValueError):
        # Some terms add up to more than float64 holds, whatever all of them come to; or some are infinite.
        (exact,) = exact_sums(column[:, None])
    if exact != NOT_FINITE:
        return rounded(exact)
    with np.errstate(all="ignore"):
        return float(column.sum())
