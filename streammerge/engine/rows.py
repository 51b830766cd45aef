"""How a piece is cut where whole rows must be seen together, and what is known of some rows.

A row belongs to the block, and to the piece, that its first element lies in: there it is measured, and
what is kept of it is counted. The first row of a piece may begin before it, and is merged once more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from streammerge.engine.pieces import PieceInMemory
from streammerge.methods.programs import Programs
from streammerge.plan.demanding import MOST_ROWS, rows_to_remember
from streammerge.plan.types import TensorTask
from streammerge.statistics import BLOCK
from streammerge.statistics.rounds import RowMemory, RowNumbers


@dataclass(frozen=True, slots=True)
class KnownRows:
    """What is known of some rows, before anything else is done with them."""

    numel: int
    """Elements of a row."""
    numbers: RowNumbers
    """``[rows, numbers]``."""
    computed: tuple[NDArray[np.float64] | NDArray[np.float32], ...] = ()
    """``[rows * numel]`` in the compute dtype for each value that is ranked within rows."""


def memory_of(programs: Programs, task: TensorTask) -> RowMemory | None:
    """Return what remembers the rows of a tensor; None where nothing is asked about them, or too much."""
    rows = rows_to_remember(programs, task)
    return RowMemory(rows, programs.row_numbers) if rows and programs.row_numbers else None


@dataclass(frozen=True, slots=True)
class Run:
    """Whole rows that are computed at once."""

    begin: int
    """First element, in the piece with all of its rows."""
    end: int
    """End of the last row there."""
    own: bool
    """Whether its rows belong to the piece."""


def iter_merging(piece: PieceInMemory) -> Iterator[Run]:
    """Yield the rows that a piece has a part of."""
    row = piece.first.task.row
    if piece.before:
        yield Run(0, row, own=False)
    yield from _iter_runs(row if piece.before else 0, piece.before + piece.numel, row)


def iter_measuring(piece: PieceInMemory) -> Iterator[list[Run]]:
    """Yield, for each block of a piece, the rows that belong to it."""
    row = piece.first.task.row
    for begin in range(0, piece.numel, BLOCK):
        end = min(begin + BLOCK, piece.numel)
        yield list(_iter_runs(_up(piece.before + begin, row), piece.before + end, row))


def iter_covering(piece: PieceInMemory, begin: int, end: int) -> Iterator[tuple[Run, slice, slice]]:
    """Yield the rows of which a range of the piece has a part, in runs of whole rows.

    Two rows that are wider than a block are two runs: scratch memory holds one.

    Returns:
        With each run, where in it the range lies, and which part of the range that is.
    """
    row = piece.first.task.row
    begin, end = piece.before + begin, piece.before + end
    for run in _iter_runs(begin // row * row, end, row):
        first, last = max(begin, run.begin), min(end, run.end)
        within = slice(first - run.begin, last - run.begin)
        yield run, within, slice(first - begin, last - begin)


def _iter_runs(begin: int, end: int, row: int) -> Iterator[Run]:
    """Yield runs of the rows that begin in a range, whose own begin is that of a row."""
    step = min(MOST_ROWS, max(1, BLOCK // row)) * row
    last = _up(end, row)
    for first in range(begin, last, step):
        yield Run(first, min(first + step, last), own=True)


def _up(element: int, row: int) -> int:
    """Return the first beginning of a row that is not before an element."""
    return -(-element // row) * row


def make_relative(ranks: NDArray[np.floating]) -> None:
    """Map ``[rows, n]`` ranks from 0 to n - 1 to numbers from 0 to 1, in place; 1/2 in rows of one."""
    last = ranks.shape[1] - 1
    if last == 0:
        ranks.fill(0.5)
    else:
        np.divide(ranks, ranks.dtype.type(last), out=ranks)


def rank_rows(values: NDArray[np.floating]) -> NDArray[np.floating]:
    """Return where each magnitude stands in its row, from 0; of equal ones the first is the largest.

    Args:
        values: ``[rows, n]``.
    """
    # Backwards and stable: of equal magnitudes the last comes first.
    order = np.argsort(np.abs(values[:, ::-1]), axis=1, kind="stable")
    ranks: NDArray[np.floating] = np.empty_like(values)
    places = np.broadcast_to(np.arange(values.shape[1], dtype=values.dtype), values.shape)
    np.put_along_axis(ranks, order, places, axis=1)
    forwards: NDArray[np.floating] = ranks[:, ::-1]
    return forwards
