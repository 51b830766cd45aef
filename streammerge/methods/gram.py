"""Inner products of models as a round, and algorithms that need nothing else.

What a method like spherical interpolation returns lies in the span of what it is given. So the whole
algorithm, iterations included, runs on coefficients: every inner product that it needs is one of the
Gram matrix ``G_ij = <v_i, v_j>``, found in one sweep in float64, and the merge is one weighted sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from itertools import combinations_with_replacement

import numpy as np
from numpy.typing import NDArray

from streammerge.statistics.rounds import Answers, Round, RowAnswers, RowNumbers, RowRound
from streammerge.tiles.writing import Row, Sheet, Sink, dot, weighted_sum

Gram = NDArray[np.float64]
"""``[n, n]``, symmetric."""
Vectors = Callable[[Sheet], Sequence[Row]]

_ROUNDING = 1e-14
"""What rounding may leave of a squared length that is 0, as part of what it is made of. Inner products
are right to 1e-16 of the lengths; with less room cancelled vectors would seem to have a direction."""


def gram_round(
    vectors: Vectors,
    settle: Callable[[Gram], Sequence[float]],
    about: tuple[Hashable, ...] = (),
) -> Round:
    """Return the round that finds the inner products of some rows, and what they come to.

    Args:
        vectors: Returns the rows.
        settle: Given their Gram matrix: the numbers for the merge.
        about: The parameters that this depends on.
    """

    def sinks(sheet: Sheet) -> Sequence[Sink]:
        rows = vectors(sheet)
        return [dot(one, other) for one, other in combinations_with_replacement(rows, 2)]

    def concluded(answers: Answers) -> Sequence[float]:
        return settle(gram_of(answers.totals))

    return Round(sinks, settle=concluded, about=about)


def gram_row_round(vectors: Vectors, settle: Callable[[Gram], RowNumbers]) -> RowRound:
    """Return the same about single rows.

    Args:
        vectors: Returns the rows of tiles.
        settle: Given ``[rows, n, n]``: the numbers for each row, ``[rows, numbers]``.
    """

    def sinks(sheet: Sheet) -> Sequence[Sink]:
        rows = vectors(sheet)
        return [dot(one, other) for one, other in combinations_with_replacement(rows, 2)]

    def settled(answers: RowAnswers) -> RowNumbers:
        count = (math.isqrt(8 * answers.totals.shape[1] + 1) - 1) // 2
        grams = np.zeros((len(answers.totals), count, count))
        upper = np.triu_indices(count)
        grams[:, upper[0], upper[1]] = grams[:, upper[1], upper[0]] = answers.totals
        return settle(grams)

    return RowRound(sinks, settled)


def gram_of(products: Sequence[float]) -> Gram:
    """Return the matrix whose upper triangle is given row by row."""
    n = (math.isqrt(8 * len(products) + 1) - 1) // 2
    gram = np.zeros((n, n))
    gram[np.triu_indices(n)] = products
    return gram + np.triu(gram, 1).T


def combined(rows: Sequence[Row], sheet: Sheet) -> Row:
    """Return the sum of rows, each times the number of its place among those that were found."""
    return weighted_sum(rows, [sheet.number(place) for place in range(len(rows))])


def norm(coefficients: NDArray[np.float64], gram: Gram) -> float:
    """Return the length of a combination of the vectors; 0 where it is no more than rounding."""
    squared = float(coefficients @ gram @ coefficients)
    most = float(np.abs(coefficients) @ np.sqrt(np.diag(gram)))
    return math.sqrt(squared) if squared > _ROUNDING * most * most else 0.0
