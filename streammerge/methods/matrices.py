"""Singular vectors of whole matrices, as the matrix methods need them, in float64.

Where a singular value is 0 up to rounding, its vectors are whatever the library happens to return. Such
directions are left out, so that a result depends on its inputs alone; of full rank nothing is left out.

All of it is done where the given matrices lie, on the CPU or on an accelerator.

Memory: at most some fifteen matrices of the tensor's size in float64; see
:data:`streammerge.plan.budgeting.WHOLE_BYTES`, and for accelerators
:func:`streammerge.plan.device_matrices.decomposing_bytes`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from streammerge.lazily import torch

if TYPE_CHECKING:
    from torch import Tensor


OBLONG = 2
"""Beyond this ratio of its sides a matrix is made square before it is decomposed."""


class Factors(NamedTuple):
    """Some singular triples of a matrix, the largest first."""

    left: Tensor
    """``[m, k]``."""
    values: Tensor
    """``[k]``."""
    right: Tensor
    """``[k, n]``."""


def decompose(matrix: Tensor, count: int, *, beside: float | None = None) -> Factors:
    """Return the first singular triples, at most ``count``, without those that are rounding.

    Args:
        matrix: ``[m, n]``, float64.
        count: Most triples.
        beside: The largest singular value of what the matrix was made from, where that is larger than
            its own: what rounding leaves of it is no direction.
    """
    left, values, right = singular_parts(matrix)
    scale = beside if beside is not None else float(values.max()) if values.numel() else 0.0
    limit = max(matrix.shape) * torch.finfo(torch.float64).eps * scale
    count = min(count, int((values > limit).sum()))
    # Copies, so that the rest of the factors is let go of.
    return Factors(left[:, :count].clone(), values[:count].clone(), right[:count].clone())


def singular_parts(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the thin singular value decomposition of a matrix, in its dtype.

    An oblong one is made square first, by a QR decomposition: LAPACK does so by itself, while cuSOLVER may
    ask for a workspace of the longer side squared.

    Args:
        matrix: ``[m, n]``, float32 or float64.

    Returns:
        ``[m, k]``, ``[k]`` the largest first, and ``[k, n]``, of ``k = min(m, n)``.
    """
    rows, columns = matrix.shape
    if rows and columns > OBLONG * rows:
        left, values, right = singular_parts(matrix.T)
        return right.T, values, left.T
    if columns and rows > OBLONG * columns:
        basis, square = torch.linalg.qr(matrix)
        left, values, right = torch.linalg.svd(square, full_matrices=False)
        return basis @ left, values, right
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return left, values, right


def largest_value(matrix: Tensor) -> float:
    """Return the largest singular value of ``[m, n]``."""
    if min(matrix.shape) and max(matrix.shape) > OBLONG * min(matrix.shape):
        tall = matrix if matrix.shape[0] > matrix.shape[1] else matrix.T
        matrix = torch.linalg.qr(tall, mode="r").R
    values = torch.linalg.svdvals(matrix)
    return float(values.max()) if values.numel() else 0.0


def nearest_orthogonal(matrix: Tensor) -> Tensor:
    """Return the orthogonal factor of the polar decomposition of ``[m, n]``; 0 where that is 0."""
    factors = decompose(matrix, min(matrix.shape))
    return factors.left @ factors.right


def added_up(vectors: Sequence[Tensor]) -> Tensor:
    """Return the sum in float64."""
    total = torch.zeros_like(vectors[0], dtype=torch.float64)
    for vector in vectors:
        total += vector
    return total
