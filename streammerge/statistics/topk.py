"""What a top-k by magnitude comes to: which elements are kept, and which of several equal ones.

Source: the trim step of TIES, Yadav et al. 2023, arXiv:2306.01708, Algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]


class TiePolicy(StrEnum):
    """Which of several elements exactly at the threshold are kept."""

    EXACT = "exact"
    """The first ones in flat order, until exactly k are kept."""
    INCLUSIVE = "inclusive"
    """All of them, as the TIES paper's code does."""
    STRICT = "strict"
    """None of them."""


@dataclass(frozen=True, slots=True)
class TopK:
    """Which elements of one source are kept: those above the threshold, and some ties."""

    threshold: float
    """The k-th largest magnitude; infinite when nothing is kept, 0 when everything is and nobody
    asks for the value."""
    numel: int
    """Elements the statistic covers."""
    greater: int
    """Elements with a magnitude above the threshold."""
    equal: int
    """Elements with exactly this magnitude."""
    ties_kept: int
    """How many of those are kept: the first in flat order."""
    cutoff_block: int
    """Block of the last kept tie, counted over the whole scope; earlier blocks keep all theirs."""
    cutoff_ties: int
    """Ties that the cutoff block keeps."""

    @property
    def kept(self) -> int:
        """Elements kept in all."""
        return self.greater + self.ties_kept

    def ties_to_keep(self, block: int) -> int | None:
        """Return how many ties ``block`` keeps, the first in flat order; None means all."""
        if block < self.cutoff_block:
            return None
        return self.cutoff_ties if block == self.cutoff_block else 0


def keep_everything(numel: int) -> TopK:
    """Return the answer for density 1."""
    return TopK(0.0, numel, numel, 0, 0, -1, 0)


def keep_nothing(numel: int) -> TopK:
    """Return the answer for a density that keeps less than one element."""
    return TopK(float("inf"), numel, 0, 0, 0, -1, 0)


def values_decide(numel: int, k: int, *, of_value: bool = False) -> bool:
    """Return whether values decide what is kept, or the k-th largest itself is asked for.

    Args:
        numel: Elements in the scope.
        k: Elements kept.
        of_value: Whether the threshold is needed even where all are kept.
    """
    return 0 < k < numel or (of_value and 0 < k == numel)


def settled_without_values(numel: int, k: int, *, of_value: bool = False) -> TopK | None:
    """Return the answer if values do not decide; see :func:`values_decide`."""
    if values_decide(numel, k, of_value=of_value):
        return None
    if k >= numel:
        return keep_everything(numel)
    return keep_nothing(numel)


def kept_count(density: float, numel: int) -> int:
    """Return k, the elements kept: the float product truncated, as PEFT and mergekit do."""
    return int(density * numel)


def count_kept(magnitudes: Floats, top: TopK, block: int, masks: NDArray[np.bool_]) -> int:
    """Return how many elements of one block are kept.

    Args:
        magnitudes: ``[m]`` absolute values.
        top: The statistic.
        block: Which block of the scope this is.
        masks: ``[2, >= m]`` scratch.
    """
    if top.greater == top.numel or not magnitudes.size:
        # An empty tensor has the number of the block that follows, and none of its ties.
        return magnitudes.size
    # What is no number ranks above everything, so those below are counted.
    below = masks[0, : magnitudes.size]
    ties = top.ties_to_keep(block)
    if ties is None:
        np.less(magnitudes, top.threshold, out=below)
        return magnitudes.size - int(np.count_nonzero(below))
    np.less_equal(magnitudes, top.threshold, out=below)
    return magnitudes.size - int(np.count_nonzero(below)) + ties


def ties_kept(tie_policy: TiePolicy, wanted: int, equal: int) -> int:
    """Return how many of ``equal`` ties are kept when ``wanted`` complete the k entries."""
    if tie_policy is TiePolicy.EXACT:
        return wanted
    return equal if tie_policy is TiePolicy.INCLUSIVE else 0


def place_ties(found: TopK, in_blocks: NDArray[np.int32]) -> TopK:
    """Find the block of the last kept tie, from the number of ties in each block."""
    if found.ties_kept == 0:
        return _cut(found, -1, 0)
    if found.ties_kept == found.equal:
        return _cut(found, in_blocks.size, 0)
    ends = np.cumsum(in_blocks, dtype=np.int64)
    block = int(np.searchsorted(ends, found.ties_kept))
    before = int(ends[block]) - int(in_blocks[block])
    return _cut(found, block, found.ties_kept - before)


def _cut(found: TopK, block: int, ties_in_block: int) -> TopK:
    return TopK(
        found.threshold,
        found.numel,
        found.greater,
        found.equal,
        found.ties_kept,
        block,
        ties_in_block,
    )
