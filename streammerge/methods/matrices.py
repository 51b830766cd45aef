"""Singular vectors of whole matrices, as the matrix methods need them, in float64.

Where a singular value is 0 up to rounding, its vectors are whatever the library happens to return. Such
directions are left out, so that a result depends on its inputs alone; of full rank nothing is left out.

Memory: at most some fifteen matrices of the tensor's size in float64; see
:data:`streammerge.plan.budgeting.WHOLE_BYTES`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from streammerge.lazily import torch

if TYPE_CHECKING:
    from torch import Tensor


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
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    scale = beside if beside is not None else float(values.max()) if values.numel() else 0.0
    limit = max(matrix.shape) * torch.finfo(torch.float64).eps * scale
    count = min(count, int((values > limit).sum()))
    # Copies, so that the rest of the factors is let go of.
    return Factors(left[:, :count].clone(), values[:count].clone(), right[:count].clone())


def largest_value(matrix: Tensor) -> float:
    """Return the largest singular value of ``[m, n]``."""
    values = torch.linalg.svdvals(matrix)
    return float(values.max()) if values.numel() else 0.0


def nearest_orthogonal(matrix: Tensor) -> Tensor:
    """Return the orthogonal factor of the polar decomposition of ``[m, n]``; 0 where that is 0."""
    factors = decompose(matrix, min(matrix.shape))
    return factors.left @ factors.right


def added_up(vectors: Sequence[Tensor]) -> Tensor:
    """Return the sum in float64."""
    total = torch.zeros(vectors[0].shape, dtype=torch.float64)
    for vector in vectors:
        total += vector
    return total
