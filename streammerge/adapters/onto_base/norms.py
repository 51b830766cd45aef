"""The norms that DoRA divides by, of every row or column of a matrix that comes in blocks of rows.

In the order that every machine keeps, squares are added up in float64: those of a row as totals are, with 16
running sums (:func:`~streammerge.tiles.totalling.add_up`), those of a column from the first row to the last.
One root and one rounding to the type of the matrix follow, so that a norm is the nearest number to the true
one, or the one beside it. PEFT's norms are torch's, which adds float32 in an order that is the library's.

Memory: 16 bytes per element of a block and 8 per column; for PEFT's norms of columns the whole matrix, twice.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from streammerge.lazily import torch
from streammerge.native.library import load_kernels
from streammerge.tiles.totalling import add_up

if TYPE_CHECKING:
    from torch import Tensor

Float64 = NDArray[np.float64]


def row_norms(blocks: Iterable[Tensor], dtype: torch.dtype) -> Tensor:
    """Return the norm of each row, ``[rows]``.

    Args:
        blocks: Rows one after the other, ``[n, columns]``, contiguous.
        dtype: The blocks' type.
    """
    totals = [square_rows(block) for block in blocks]
    return rounded_roots(np.concatenate(totals), dtype)


def column_norms(blocks: Iterable[Tensor], columns: int, count: int, dtype: torch.dtype) -> Tensor:
    """Return the norm of each column, or of as many side by side as there are per norm.

    Args:
        blocks: As for :func:`row_norms`.
        columns: Columns of the matrix.
        count: How many norms there are; a divisor of the columns.
        dtype: As for :func:`row_norms`.

    Returns:
        ``[count]``.
    """
    totals = np.zeros(columns)
    for block in blocks:
        add_square_columns(block, totals)
    if count != columns:
        totals = add_up(totals.reshape(count, -1))
    return rounded_roots(totals, dtype)


def rounded_roots(totals: Float64, dtype: torch.dtype) -> Tensor:
    """Return the norms whose squares these are, ``[n]``."""
    # Roots of IEEE 754 have one result.
    return torch.from_numpy(np.sqrt(totals)).to(dtype)


# What is computed may be infinite, or no number; who merges it says so.
@np.errstate(all="ignore")
def square_rows(block: Tensor) -> Float64:
    """Return the sum of each row's squares, ``[n]``, of ``[n, columns]``."""
    kernels = load_kernels()
    if kernels is None or block.dtype is not torch.float32:
        return add_up(_squares(block))
    rows, columns = block.shape
    totals = np.empty(rows)
    kernels.row_squares(block.data_ptr(), rows, columns, totals.ctypes.data)
    return totals


@np.errstate(all="ignore")
def add_square_columns(block: Tensor, totals: Float64) -> None:
    """Add the squares of ``[n, columns]`` to totals ``[columns]``, row by row."""
    kernels = load_kernels()
    if kernels is None or block.dtype is not torch.float32:
        squares = _squares(block)
        squares[0] += totals
        # Not a sum: that of a single column would be added up in pairs.
        totals[:] = np.add.accumulate(squares, axis=0, out=squares)[-1]
        return
    rows, columns = block.shape
    kernels.column_squares(block.data_ptr(), rows, columns, totals.ctypes.data)


def _squares(block: Tensor) -> Float64:
    squares = block.numpy().astype(np.float64)
    squares *= squares
    return squares


def row_norms_of_torch(blocks: Iterable[Tensor]) -> Tensor:
    """Return PEFT's norms of rows, as :func:`row_norms` does."""
    return torch.cat([torch.linalg.norm(block, dim=1) for block in blocks])


def column_norms_of_torch(blocks: Iterable[Tensor]) -> Tensor:
    """Return PEFT's norms of columns, which torch finds of the whole matrix."""
    norms: Tensor = torch.linalg.norm(torch.cat(list(blocks)).T, dim=1)
    return norms
