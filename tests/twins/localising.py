"""What survives in a sum of task vectors, and one task vector for all: TALL masks, EMR, MagMax."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from twins.shapes import Array, spread, subtract_base

Balance = Literal["zero", "plus", "minus"]
Equals = Literal["first", "last"]


def tall_masks(
    base: Array | None,
    sources: Sequence[Array],
    *,
    mask_lambda: float | Sequence[float] = 0.4,
    strict: bool = False,
) -> list[NDArray[np.bool_]]:
    """Return per source where the sum of all task vectors still holds its own.

    ``m_t = |tau_t| >= lambda_t |tau_sum - tau_t|``

    Args:
        base: Required.
        sources: One or more.
        mask_lambda: How much less of the others there must be, per source.
        strict: ``>`` in place of ``>=``, so that what no source moves is in no mask.

    Source: Wang et al. 2024, arXiv:2405.07813, TALL-masks.
    Differs from the authors' code (nik-dim/tall_masks), which has ``>``.
    """
    _, tasks = subtract_base(base, sources)
    total = sum(tasks, start=np.zeros_like(tasks[0]))
    masks = []
    for task, factor in zip(tasks, spread(mask_lambda, len(tasks)), strict=True):
        rest = factor * np.abs(total - task)
        masks.append(np.abs(task) > rest if strict else np.abs(task) >= rest)
    return masks


def consensus(
    base: Array | None,
    sources: Sequence[Array],
    *,
    k: int = 2,
    mask_lambda: float | Sequence[float] = 0.4,
    lambda_: float = 1.0,
    strict: bool = False,
) -> Array:
    """Return the base plus the sum of task vectors where at least ``k`` masks agree.

    Args:
        base: Required.
        sources: One or more.
        k: 0 is task arithmetic, 1 leaves out what serves no task, 2 also what serves one alone,
            more than there are sources gives the base.
        mask_lambda: See :func:`tall_masks`.
        lambda_: A factor on the whole change.
        strict: See :func:`tall_masks`; what no source moves is 0 anyway.

    Source: Wang et al. 2024, arXiv:2405.07813, Consensus Merging of task arithmetic.
    """
    start, tasks = subtract_base(base, sources)
    agreeing = np.zeros(start.shape, dtype=np.int64)
    for mask in tall_masks(base, sources, mask_lambda=mask_lambda, strict=strict):
        agreeing = agreeing + mask
    total = sum(tasks, start=np.zeros_like(start))
    return start + lambda_ * np.where(agreeing >= k, total, 0.0)


def emr_unify(
    base: Array | None,
    sources: Sequence[Array],
    *,
    lambda_: float = 1.0,
    balance: Balance = "zero",
) -> Array:
    """Return the base plus, per entry, the largest magnitude among those of the elected sign.

    Args:
        base: Required.
        sources: One or more.
        lambda_: A factor on the whole change.
        balance: What a sum of 0 elects: nothing, +, or -.

    Source: Huang et al. 2024, arXiv:2405.17461, the step Elect: ``sgn(sum_t tau_t)`` times the
    largest ``|tau_t|`` that agrees, without the masks and rescalers per task.
    Differs from the authors' code (harveyhuang18/EMR_Merging), where a sum of 0 elects -; the
    paper's sign of 0 is 0.
    """
    start, tasks = subtract_base(base, sources)
    elected = np.sign(sum(tasks, start=np.zeros_like(start)))
    elected = np.where(elected == 0, {"zero": 0.0, "plus": 1.0, "minus": -1.0}[balance], elected)
    largest = np.zeros_like(start)
    for task in tasks:
        largest = np.maximum(largest, np.where(task * elected > 0, np.abs(task), 0.0))
    return start + lambda_ * elected * largest


def magmax(
    base: Array | None,
    sources: Sequence[Array],
    *,
    lambda_: float = 1.0,
    of_equals: Equals = "last",
) -> Array:
    """Return the base plus, per entry, the change of largest magnitude.

    Args:
        base: Required.
        sources: One or more.
        lambda_: A factor on the whole change.
        of_equals: Which source of several with equal magnitudes is taken.

    Source: Marczak et al. 2024, arXiv:2407.06322, maximum magnitude selection. The last of equals
    is what the authors' code (danielm1405/magmax) takes.
    """
    start, tasks = subtract_base(base, sources)
    chosen = tasks[0]
    for task in tasks[1:]:
        larger = np.abs(task) > np.abs(chosen)
        if of_equals == "last":
            larger = np.abs(task) >= np.abs(chosen)
        chosen = np.where(larger, task, chosen)
    return start + lambda_ * chosen
