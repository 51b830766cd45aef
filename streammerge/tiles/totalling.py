"""Totals of rows, in the order of addition that every machine keeps.

Memory: 16 bytes per element.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from streammerge.tiles.program import Op, Program

if TYPE_CHECKING:
    from torch import Tensor

Floats = NDArray[np.floating[Any]]

_LANES = 16
"""Running sums that a total is added up in, element ``i`` in sum ``i % 16``."""


# What is computed may be infinite, or no number; who merges it says so.
@np.errstate(all="ignore")
def total_rows(op: Op, a: Floats, b: Floats | None) -> NDArray[np.float64]:
    """Return the total of each row, ``[rows]``.

    Args:
        op: What kind of total.
        a: ``[rows, m]``.
        b: ``[rows, m]``, for products and counts of two rows; None for one row.
    """
    if op is Op.COUNT:
        chosen = a != 0 if b is None else (a != 0) & (b != 0)
        return _counted(chosen)
    if op is Op.OPPOSED:
        assert b is not None  # noqa: S101 - it is about two
        opposed = ((a > 0) & (b < 0)) | ((a < 0) & (b > 0))
        return _counted(opposed)
    if op is Op.LARGEST:
        largest: NDArray[np.float64] = a.max(axis=1, initial=-np.inf).astype(np.float64) + 0.0
        return largest
    terms = a.astype(np.float64)
    if op is Op.DOT:
        assert b is not None  # noqa: S101 - it is about two
        terms *= b
    return add_up(terms)


def _counted(chosen: NDArray[np.bool_]) -> NDArray[np.float64]:
    counts: NDArray[np.float64] = np.count_nonzero(chosen, axis=1).astype(np.float64)
    return counts


def add_up(terms: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the sum of each row of ``[rows, m]``, in the order that every machine keeps.

    Element ``i`` is added to running sum ``i % 16``; then the upper half of the sums is added to the
    lower half, four times. A total of zero has no sign: versions of numpy differ.
    """
    n_rows, numel = terms.shape
    whole = numel // _LANES * _LANES
    lanes = terms[:, :whole].reshape(n_rows, numel // _LANES, _LANES).sum(axis=1)
    lanes[:, : numel - whole] += terms[:, whole:]
    for half in (8, 4, 2, 1):
        lanes = lanes[:, :half] + lanes[:, half:]
    added: NDArray[np.float64] = lanes[:, 0] + 0.0
    return added


class HostSinks:
    """Takes what a program on the CPU does not store; see :class:`streammerge.tiles.interpreter.Sinks`."""

    def __init__(
        self, program: Program, on_ranked: Callable[[int, Tensor], None], *, rows: int = 1
    ) -> None:
        """Make room for totals.

        Args:
            program: The program.
            on_ranked: Is given what is ranked: which value, and ``[m]`` of it in a register.
            rows: Rows that are totalled each by itself; of one length.
        """
        self.totals = np.zeros((rows, len(program.totals)))
        """``[rows, totals]``."""
        self.rank = on_ranked

    def total(self, index: int, op: Op, a: Tensor, b: Tensor | None) -> None:
        """Total every row."""
        rows = len(self.totals), a.numel() // max(len(self.totals), 1)
        other = None if b is None else b.numpy().reshape(rows)
        self.totals[:, index] = total_rows(op, a.numpy().reshape(rows), other)
