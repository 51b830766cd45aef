"""What sparsifies one task vector, and what makes up for it.

One order serves all: by falling magnitude, and among equal magnitudes by place in the row-major
order, so the first of equals counts as the largest.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from twins.shapes import Array

KRule = Literal["floor", "at_least_one", "one_more"]
TiePolicy = Literal["exact", "inclusive", "strict"]
Rescale = Literal["none", "density", "l1", "probability"]


def order_by_magnitude(task: Array) -> NDArray[np.intp]:
    """Return the flat indices of all entries, largest first, and first among equals."""
    return _order_of(task.ravel().tobytes())


# Tests ask again and again about the same task vectors, and to sort them takes most of their time.
@lru_cache(maxsize=16)
def _order_of(values: bytes) -> NDArray[np.intp]:
    return np.argsort(-np.abs(np.frombuffer(values)), kind="stable")


def count_kept(numel: int, density: float, k_rule: KRule) -> int:
    """Return how many of ``numel`` entries a trim keeps.

    ``floor`` is ``int(density * numel)``, the float product truncated: 28 of 100 at 0.29.
    ``at_least_one`` keeps one where that is 0 though the density is not. ``one_more`` keeps one
    more than ``floor``, as the authors of TIES do.
    """
    if density >= 1:
        return numel
    if density <= 0 or numel == 0:
        return 0
    k = int(density * numel)
    if k_rule == "one_more":
        return min(k + 1, numel)
    return max(1, k) if k_rule == "at_least_one" else k


def keep_largest(
    task: Array, *, density: float, k_rule: KRule = "floor", tie_policy: TiePolicy = "exact"
) -> Array:
    """Return the task vector with zeros but for its largest magnitudes.

    Args:
        task: Any shape.
        density: Fraction kept; 0 and below keep nothing, 1 and above everything.
        k_rule: See :func:`count_kept`.
        tie_policy: ``exact`` keeps k, ``inclusive`` all that equal the k-th too, ``strict`` none
            of those.

    Source: the trim of Yadav et al. 2023, arXiv:2306.01708.
    Differs from mergekit 0.1.5 and PEFT: which of equal magnitudes are kept is said.
    """
    flat = task.ravel()
    k = count_kept(flat.size, density, k_rule)
    keep = np.zeros(flat.size, dtype=bool)
    keep[order_by_magnitude(task)[:k]] = True
    if 0 < k < flat.size:
        threshold = np.abs(flat)[order_by_magnitude(task)[k - 1]]
        if tie_policy == "inclusive":
            keep = np.abs(flat) >= threshold
        elif tie_policy == "strict":
            keep = np.abs(flat) > threshold
    return np.where(keep.reshape(task.shape), task, 0.0)


def keep_between(task: Array, *, density: float, gamma: float) -> Array:
    """Return the task vector without its largest and its smallest magnitudes.

    Args:
        task: Any shape.
        density: Fraction kept: ``int(density * numel)`` entries.
        gamma: Fraction dropped for being largest: ``int(gamma * numel)`` entries; fewer where
            that would leave less than ``density``.

    Source: Davari and Belilovsky 2023, arXiv:2312.06795. Agrees with mergekit 0.1.5.
    """
    if density >= 1:
        return task.copy()
    numel = task.size
    target = max(int(density * numel), 0)
    lowest = max(0, numel - target - int(gamma * numel))
    begin = numel - target - lowest
    keep = np.zeros(numel, dtype=bool)
    keep[order_by_magnitude(task)[begin : begin + target]] = True
    return np.where(keep.reshape(task.shape), task, 0.0)


def keep_masked(task: Array, mask: Array) -> Array:
    """Return the task vector where a given mask is not 0, and zeros elsewhere."""
    return np.where(np.asarray(mask).reshape(task.shape) != 0, task, 0.0)


def della_probabilities(
    task: Array,
    *,
    density: float,
    epsilon: float,
    ranks_along: Literal["last", "second"] = "last",
) -> Array:
    """Return the probabilities with which DELLA keeps entries, by their ranks in their rows.

    Of a row of n entries the smallest magnitude has ``density - epsilon``, the largest ``density +
    epsilon``, in n equal steps. A row of one entry has ``density``. A density of 0 and below keeps
    nothing, of 1 and above everything.

    Args:
        task: Any shape; one row if it has fewer than two dimensions.
        density: The mean probability.
        epsilon: Half the range.
        ranks_along: ``last``: rows lie along the last dimension. ``second``: along the second, as
            in mergekit, which differs from three dimensions on.

    Raises:
        ValueError: A probability would not be in (0, 1).

    Source: Deep, Bhardwaj and Poria 2024, arXiv:2406.11617, MagPrune; the range is that of
    mergekit 0.1.5, from ``density - epsilon`` to ``density + epsilon``.
    Differs from mergekit: ranks are exact in every type; rows of one entry are no error.
    """
    if density <= 0:
        return np.zeros_like(task)
    if density >= 1:
        return np.ones_like(task)
    if density - epsilon <= 0 or density + epsilon >= 1:
        raise ValueError(f"density {density} and epsilon {epsilon} lead out of (0, 1)")
    if task.ndim > 2 and ranks_along == "second":
        moved = np.moveaxis(task, 1, -1)
        probabilities = della_probabilities(moved, density=density, epsilon=epsilon)
        return np.moveaxis(probabilities, -1, 1)
    numel = task.shape[-1] if task.ndim else 1
    rows = task.reshape(-1, numel) if task.size else task.reshape(0, 1)
    probabilities = np.full(rows.shape, float(density))
    if numel > 1:
        for row, of_row in zip(rows, probabilities, strict=True):
            # The largest comes first and has the highest rank.
            ranks = np.empty(numel)
            ranks[order_by_magnitude(row)] = np.arange(numel, 0, -1)
            of_row[:] = (density - epsilon) + 2 * epsilon * (ranks - 1) / (numel - 1)
    return probabilities.reshape(task.shape)


def rescale(
    kept: Array,
    task: Array,
    *,
    by: Rescale,
    density: float,
    probabilities: Array | None = None,
) -> Array:
    """Return what is kept, made larger to make up for what is not.

    Args:
        kept: The sparsified task vector.
        task: What it was.
        by: ``density`` divides by it; DAREx-q gives its q as the density, arXiv:2410.09344.
            ``l1`` multiplies by the ratio of the sums of magnitudes, unless one is below 1e-7;
            mergekit 0.1.5 does so in float32 for random masks, whatever the tensors are.
            ``probability`` divides every entry by its own probability, as DELLA's paper does.
        density: The divisor of ``density``. At 1 and above nothing is rescaled by any rule.
        probabilities: Those of ``probability``.
    """
    if by == "none" or density >= 1:
        return kept
    if by == "density":
        return kept / density if density > 0 else kept
    if by == "probability":
        if probabilities is None:
            raise ValueError("no probabilities")
        return kept / np.where(probabilities > 0, probabilities, 1.0)
    before, after = float(np.sum(np.abs(task))), float(np.sum(np.abs(kept)))
    return kept if before < 1e-7 or after < 1e-7 else kept * (before / after)
