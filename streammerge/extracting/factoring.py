"""A matrix as the product of two thin ones.

Source: the best approximation of a rank is that of the largest singular values (Eckart and Young 1936);
found by random projection with power iterations (Halko, Martinsson and Tropp 2011, arXiv:0909.4061,
algorithms 4.4 and 5.1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streammerge.extracting.plans import EXACT_BELOW
from streammerge.methods.matrices import singular_parts

OVERSAMPLE = 24
"""Columns of the projection beyond the rank."""
_POWERS = 4
"""Power iterations: what is neglected is damped by the ratio of singular values to the ninth."""
_READING_BYTES = 24 * 2**20
"""What reading a difference takes: two steps as stored and in float32."""
_LIBRARY_BYTES = 16 * 2**20
"""What a product of matrices is packed into, by one thread."""
_ERROR_ROWS = 128
"""Rows of a product that are compared at once."""


@dataclass(frozen=True, slots=True)
class Factored:
    """A matrix, factored."""

    down: Tensor
    """``A [rank, columns]``."""
    up: Tensor
    """``B [rows, rank]``; ``B @ A`` is nearly the matrix, and both share the singular values' roots."""


def factor(matrix: Tensor, rank: int, *, exact: bool, seed: int) -> Factored:
    """Return the factors of a matrix that lies on the host.

    Args:
        matrix: ``[m, n]`` in float32.
        rank: At most the smaller side.
        exact: Whether to find all singular values first; else those of a random projection.
        seed: Of the projection, for each matrix one of its own.
    """
    drawn = None if exact else torch.from_numpy(draw_projection(matrix.shape, rank, seed))
    return factor_with(matrix, rank, drawn)


def draw_projection(shape: Sequence[int], rank: int, seed: int) -> NDArray[np.float32]:
    """Return the columns that a matrix is multiplied with, ``[n, k]``: the same for every device.

    Args:
        shape: ``(m, n)``.
        rank: At most the smaller side.
        seed: For each matrix one of its own.
    """
    columns = min(rank + OVERSAMPLE, *shape)
    generator = np.random.Generator(np.random.Philox(key=seed))
    # Memory of torch's begins with a cache line, which NumPy's need not: products of the CPU's libraries
    # have the same bits only from the same place in one.
    drawn: NDArray[np.float32] = torch.empty(shape[1], columns).numpy()
    return generator.standard_normal(dtype=np.float32, out=drawn)


def factor_with(matrix: Tensor, rank: int, projection: Tensor | None) -> Factored:
    """Return the factors of a matrix, where it lies.

    Args:
        matrix: ``[m, n]`` in float32.
        rank: At most the smaller side.
        projection: What :func:`draw_projection` returned, beside the matrix; None to find all singular
            values first.
    """
    if projection is None:
        left, values, right = singular_parts(matrix)
    else:
        left, values, right = _project(matrix, projection)
    roots = values[:rank].sqrt()
    up, down = left[:, :rank] * roots, roots[:, None] * right[:rank]
    # Singular vectors have no sign of their own: the largest entry of every column of B is positive.
    largest = up.abs().argmax(dim=0, keepdim=True)
    signs = torch.where(up.gather(0, largest) < 0, -1.0, 1.0)
    return Factored((down * signs.T).contiguous(), (up * signs).contiguous())


def _project(matrix: Tensor, projection: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return leading singular vectors and values, from a space that powers of the matrix turn to them."""
    space, _ = torch.linalg.qr(matrix @ projection)
    for _ in range(_POWERS):
        other, _ = torch.linalg.qr(matrix.T @ space)
        space, _ = torch.linalg.qr(matrix @ other)
    small, values, right = singular_parts(space.T @ matrix)
    return space @ small, values, right


def relative_error(matrix: Tensor, down: Tensor, up: Tensor) -> float:
    """Return ``|D - B A| / |D|`` in the Frobenius norm, of factors as they are stored; 0 for zeros."""
    missed = whole = 0.0
    wide = down.to(torch.float32)
    for begin in range(0, len(matrix), _ERROR_ROWS):
        rows = matrix[begin : begin + _ERROR_ROWS]
        rest = rows - up[begin : begin + _ERROR_ROWS].to(torch.float32) @ wide
        missed += float(rest.double().square().sum())
        whole += float(rows.double().square().sum())
    return math.sqrt(missed / whole) if whole else 0.0


def workspace(rows: int, columns: int, rank: int, *, exact: bool) -> int:
    """Return the bytes that factoring a matrix takes at its worst, the matrix included."""
    numel, smaller = rows * columns, min(rows, columns)
    if exact:
        # The matrix, LAPACK's copy, both sets of vectors, its work space, and the factors.
        return 4 * (3 * numel + (rows + columns) * smaller + 8 * smaller * smaller) + _small(
            rows, columns
        )
    wide = min(rank + OVERSAMPLE, smaller)
    # The matrix; spaces on both sides, their copies and products; and the factors.
    return 4 * (numel + 8 * (rows + columns) * wide) + _small(rows, columns)


def _small(rows: int, columns: int) -> int:
    """Return what comparing, reading and the library's own buffers take beside that."""
    return comparing_bytes(columns) + reading_bytes() + _LIBRARY_BYTES + 16 * (rows + columns)


def comparing_bytes(columns: int) -> int:
    """Return what :func:`relative_error` takes: a product, the rest of it, both as doubles, and squares."""
    return (4 * 2 + 8 * 4) * _ERROR_ROWS * columns


def reading_bytes() -> int:
    """Return what the reading of a difference takes."""
    return _READING_BYTES


def is_exact(rows: int, columns: int, rank: int, *, wanted: bool) -> bool:
    """Return whether a matrix is decomposed exactly: where it is asked for, or costs nothing."""
    smaller = min(rows, columns)
    return wanted or smaller <= EXACT_BELOW or rank + OVERSAMPLE >= smaller // 2
