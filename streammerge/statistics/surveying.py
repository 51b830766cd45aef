"""What a report knows of a tensor: sums and counts over its elements, in one order, that add up.

With ``v_i`` the vector of source ``i`` (its task vector; its own values where there is no base), ``d`` what
the merge made of it (less the base, where there is one) and ``k_i`` what a trim keeps of ``v_i``:

    sums     <v_i, v_j> for i <= j, <base, base>, <d, d>, <d, v_i>, <k_i, k_i>
    counts   of elements: v_i not 0, signs of sources in conflict; and of what is kept: k_i not 0,
             k_i and k_j not 0 for i < j, signs in conflict
    largest  |v_i|, and the first element that has it
    samples  a histogram of |v_i| for one element in 256

Norms, cosines and shares are made of these when all of them are there. Sums of blocks are in float64
(:mod:`streammerge.tiles.totalling`), and exact from there on (:mod:`streammerge.statistics.exact`), so
that every number has the same bits however a tensor is cut, and whoever surveys its parts.

Memory: a :class:`Surveyed` takes about 100 bytes per number; a finished row eight.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, combinations_with_replacement
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streammerge.statistics import BLOCK
from streammerge.statistics.exact import Exact, added, rounded

BINS = 128
"""Of a histogram of magnitudes, two for each power of two; the first one takes what is smaller, too."""
FIRST_EXPONENT = -48
"""The second bin begins right above two to this power: half of :data:`BINS` powers go up from there."""
SAMPLED = 256
"""One element in so many is in a histogram: a run of consecutive ones in every block."""
_STRIDE = 37
"""From the place of a block's run to that of the next one's; odd, so that all places take turns. Rows of
matrices have even lengths, and should not be sampled at the same columns always."""


@dataclass(frozen=True, slots=True)
class SurveyLayout:
    """Which numbers there are of a tensor, and their order."""

    sources: int
    """Sources that are merged to it."""
    has_base: bool
    """Whether vectors are differences from a base."""
    keeps: bool
    """Whether the method trims every source's vector by itself, so that there are kept sets."""

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """Two different sources, the lower one first, in order."""
        return tuple(combinations(range(self.sources), 2))

    @property
    def n_sums(self) -> int:
        """How many sums there are."""
        gram = self.sources * (self.sources + 1) // 2
        return gram + self.has_base + 1 + self.sources + self.sources * self.keeps

    @property
    def n_counts(self) -> int:
        """How many counts there are."""
        kept = (self.sources + len(self.pairs) + self._conflicting) * self.keeps
        return self.sources + self._conflicting + kept

    @property
    def n_totals(self) -> int:
        """Sums, counts, and a largest value for each source."""
        return self.n_sums + self.n_counts + self.sources

    @property
    def width(self) -> int:
        """Numbers of a finished row: those, and the element of each largest value."""
        return self.n_totals + self.sources

    @property
    def _conflicting(self) -> int:
        return 1 if self.sources > 1 else 0

    def product(self, one: int, other: int) -> int:
        """Return where the inner product of two vectors stands."""
        first, second = min(one, other), max(one, other)
        return first * self.sources - first * (first - 1) // 2 + second - first

    @property
    def base_square(self) -> int:
        """Where the base's squared norm stands."""
        return self.sources * (self.sources + 1) // 2

    @property
    def result_square(self) -> int:
        """Where the squared norm of what the merge made stands."""
        return self.base_square + self.has_base

    def carried(self, source: int) -> int:
        """Return where the inner product of the result and a vector stands."""
        return self.result_square + 1 + source

    def kept_square(self, source: int) -> int:
        """Return where the squared norm of what is kept of a vector stands."""
        return self.result_square + 1 + self.sources + source

    def changed(self, source: int) -> int:
        """Return where the number of elements that are not 0 stands."""
        return self.n_sums + source

    @property
    def conflicts(self) -> int:
        """Where the number of elements stands in which sources have opposite signs."""
        return self.n_sums + self.sources

    def kept(self, source: int) -> int:
        """Return where the number of elements that are kept, and not 0, stands."""
        return self.conflicts + self._conflicting + source

    def overlap(self, one: int, other: int) -> int:
        """Return where the number of elements stands that are kept of both."""
        place = self.pairs.index((min(one, other), max(one, other)))
        return self.conflicts + self._conflicting + self.sources + place

    @property
    def kept_conflicts(self) -> int:
        """Where the number of elements stands in which what is kept has opposite signs."""
        return self.conflicts + self._conflicting + self.sources + len(self.pairs)

    def largest(self, source: int) -> int:
        """Return where the largest magnitude stands."""
        return self.n_sums + self.n_counts + source

    def largest_at(self, source: int) -> int:
        """Return where the element of that stands, in a finished row."""
        return self.n_totals + source

    def products(self) -> Iterator[tuple[int, int]]:
        """Yield the sources of every inner product, in order."""
        return combinations_with_replacement(range(self.sources), 2)


@dataclass(frozen=True, slots=True)
class Surveyed:
    """The numbers of a range of one tensor, which add up to those of the tensor."""

    sums: tuple[Exact, ...]
    """In the order of the layout."""
    counts: tuple[int, ...]
    """In the order of the layout."""
    largest: tuple[tuple[float, int], ...]
    """Per source the largest magnitude, and the flat index in the tensor of the first that has it."""
    histograms: tuple[tuple[tuple[int, int], ...], ...]
    """Per source the bins that hold anything of the sample: which, and how many."""

    def joined(self, other: Surveyed) -> Surveyed:
        """Return the numbers of both ranges together, without the histograms, which are added elsewhere."""
        return Surveyed(
            tuple(added(a, b) for a, b in zip(self.sums, other.sums, strict=True)),
            tuple(a + b for a, b in zip(self.counts, other.counts, strict=True)),
            tuple(_larger(a, b) for a, b in zip(self.largest, other.largest, strict=True)),
            (),
        )

    def row(self) -> NDArray[np.float64]:
        """Return the finished numbers, ``[width]``, each sum rounded once."""
        magnitudes = [magnitude for magnitude, _ in self.largest]
        elements = [element for _, element in self.largest]
        return np.array([*map(rounded, self.sums), *self.counts, *magnitudes, *elements])


def fields_of(surveyed: Surveyed) -> tuple[tuple[Any, ...], ...]:
    """Return its fields, as a journal holds them; ``Surveyed(*fields)`` is the same again."""
    return surveyed.sums, surveyed.counts, surveyed.largest, surveyed.histograms


def _larger(one: tuple[float, int], other: tuple[float, int]) -> tuple[float, int]:
    """Return the larger magnitude; of equal ones the first."""
    return min(one, other, key=lambda each: (-each[0], each[1]))


def nothing_surveyed(layout: SurveyLayout) -> Surveyed:
    """Return the numbers of no elements at all."""
    return Surveyed(
        ((0, 0),) * layout.n_sums,
        (0,) * layout.n_counts,
        ((0.0, 0),) * layout.sources,
        ((),) * layout.sources,
    )


def sampled_run(start: int, numel: int) -> tuple[int, int]:
    """Return which elements of a block, or of the rest of a tensor, are in histograms.

    Args:
        start: Its first element in the tensor: a multiple of a block.
        numel: Its elements, at most a block.

    Returns:
        The first one, from the block's beginning on, and how many.
    """
    place = start // BLOCK * _STRIDE % SAMPLED
    return numel // SAMPLED * place, -(-numel // SAMPLED)


def bins_of(magnitudes: NDArray[np.float32]) -> NDArray[np.int64]:
    """Return the bin of every magnitude."""
    halves = (magnitudes.view(np.int32) >> 22).astype(np.int64)
    return np.clip(halves - 2 * (127 + FIRST_EXPONENT) + 1, 0, BINS - 1)


def bin_edges() -> NDArray[np.float64]:
    """Return the smallest magnitude of every bin, ``[BINS]``; that of the first is 0."""
    halves = np.arange(BINS - 1)
    edges = np.ldexp(1.0 + (halves % 2) / 2, FIRST_EXPONENT + halves // 2)
    return np.concatenate([[0.0], edges])


def count_bins(
    numels: Sequence[int], values: NDArray[np.float32]
) -> list[tuple[tuple[int, int], ...]]:
    """Return the histogram of each of several parts, as the bins that hold anything.

    Args:
        numels: How many of the values, in order, are of each part.
        values: Magnitudes, ``[sum of numels]``.
    """
    owners = np.repeat(np.arange(len(numels)), numels)
    counts = np.bincount(owners * BINS + bins_of(values), minlength=len(numels) * BINS)
    (places,) = counts.nonzero()
    found: list[list[tuple[int, int]]] = [[] for _ in numels]
    for place, count in zip(places.tolist(), counts[places].tolist(), strict=True):
        found[place // BINS].append((place % BINS, count))
    return list(map(tuple, found))
