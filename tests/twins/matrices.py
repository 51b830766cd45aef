"""Merges in the singular vectors of whole matrices: TSV-M, Iso-C and Iso-CTS.

Tensors that are not of two dimensions are averaged, as the authors' codes do (they average CLIP's
``text_projection`` too, for its name); matrices are added, so ``lambda_`` means another thing there.

Where a singular value is 0 up to rounding, its vectors are whatever the library happens to return.
The authors' codes use them all the same. Here such directions are left out, so the result is a
function of the input; with full rank it makes no difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from twins.shapes import Array, subtract_base

Mean = Literal["rank", "all"]
Factors = tuple[Array, Array, Array]


def tsv_m(base: Array | None, sources: Sequence[Array], *, lambda_: float = 1.0) -> Array:
    """Return the base plus the task vectors' leading singular parts, made orthogonal to each other.

    Of N task vectors each gives its first ``min(m, n) // N`` singular triples. Side by side, the
    left vectors and the right ones are each replaced by the nearest orthonormal ones.

    Args:
        base: Required.
        sources: One or more.
        lambda_: A factor on the whole change.

    Source: Gargiulo et al. 2025, arXiv:2412.00081, TSV-Merge; AntoAndGar/task_singular_vectors.
    Differs from the code: see the module; and it takes ``int(min(m, n) * (1 / N))``, one less
    where the float product falls short, of 49 with N = 49.
    """
    start, tasks = subtract_base(base, sources)
    if start.ndim != 2:
        return start + lambda_ * _average(tasks)
    rank = min(start.shape) // len(tasks)
    parts = [_decompose(task, rank) for task in tasks]
    left = np.concatenate([part[0] for part in parts], axis=1)
    values = np.concatenate([part[1] for part in parts])
    right = np.concatenate([part[2] for part in parts], axis=0)
    merged: Array = (_orthogonal(left) * values) @ _orthogonal(right)
    return start + lambda_ * merged


def iso_c(
    base: Array | None, sources: Sequence[Array], *, lambda_: float = 1.0, mean: Mean = "rank"
) -> Array:
    """Return the base plus the sum of task vectors with all singular values made equal.

    Args:
        base: Required.
        sources: One or more.
        lambda_: A factor on the whole change.
        mean: Over as many singular values as the sum has rank, in its directions alone; or over
            ``min(m, n)`` in as many directions, as the code does, of which some are arbitrary.

    Source: Marczak et al. 2025, arXiv:2502.04959, isotropic merging in the common
    subspace; danielm1405/iso-merging.
    """
    start, tasks = subtract_base(base, sources)
    if start.ndim != 2:
        return start + lambda_ * _average(tasks)
    if start.size == 0:
        return start
    total = sum(tasks, start=np.zeros_like(start))
    if mean == "all":
        left, values, right = np.linalg.svd(total, full_matrices=False)
    else:
        left, values, right = _decompose(total, min(start.shape))
    if values.size == 0:
        return start
    return start + lambda_ * float(np.mean(values)) * np.asarray(left @ right)


def iso_cts(
    base: Array | None,
    sources: Sequence[Array],
    *,
    common_space_fraction: float = 0.8,
    lambda_: float = 1.0,
) -> Array:
    """Return what :func:`iso_c` does, with the least directions replaced by the tasks' own.

    Of ``r = min(m, n)`` directions ``c`` are common, the first of the sum of task vectors; each
    task gives the first ``(r - c) / N`` of what it has outside the common left space. All are made
    orthonormal, and all singular values equal to their mean.

    Args:
        base: Required.
        sources: One or more.
        common_space_fraction: In [0, 1]; ``c`` is about that part of r, such that the rest divides.
        lambda_: A factor on the whole change.

    Source: Marczak et al. 2025, arXiv:2502.04959, common and task-specific subspaces;
    danielm1405/iso-merging.
    Differs from the code: see the module; and where its rounding would take more directions for
    the tasks than there are, they take as many as fit.
    """
    start, tasks = subtract_base(base, sources)
    if start.ndim != 2:
        return start + lambda_ * _average(tasks)
    directions = min(start.shape)
    common, each = count_directions(directions, len(tasks), common_space_fraction)
    left, values, right = _decompose(sum(tasks, start=np.zeros_like(start)), common)
    parts = []
    for task in tasks:
        own = task - left @ (left.T @ task)
        # What projection leaves of nothing is rounding, small beside the task vector itself.
        parts.append(_decompose(own, each, beside=task))
    parts.append((left, values, right))
    values = np.concatenate([part[1] for part in parts])
    if values.size == 0:
        return start
    left = _orthogonal(np.concatenate([part[0] for part in parts], axis=1))
    right = _orthogonal(np.concatenate([part[2] for part in parts], axis=0))
    return start + lambda_ * float(np.mean(values)) * np.asarray(left @ right)


def count_directions(directions: int, tasks: int, fraction: float) -> tuple[int, int]:
    """Return how many directions are common, and how many each task adds; together all."""
    wanted = directions - int(directions * fraction)
    each = min(round(wanted / tasks), directions // tasks)
    return directions - each * tasks, each


def _average(tasks: Sequence[Array]) -> Array:
    return np.asarray(sum(tasks, start=np.zeros_like(tasks[0])) / len(tasks))


def _decompose(matrix: Array, count: int, *, beside: Array | None = None) -> Factors:
    """Return the first singular triples, at most ``count``, without those that are rounding."""
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    largest = values if beside is None else np.linalg.svd(beside, compute_uv=False)
    scale = float(np.max(largest, initial=0.0))
    limit = max(matrix.shape, default=0) * np.finfo(np.float64).eps * scale
    count = min(count, int(np.sum(values > limit)))
    return left[:, :count], values[:count], right[:count]


def _orthogonal(matrix: Array) -> Array:
    """Return the orthogonal factor of the polar decomposition, 0 where the matrix is."""
    left, _, right = _decompose(matrix, min(matrix.shape))
    return np.asarray(left @ right)
