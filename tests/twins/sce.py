"""SCE: select the entries that vary most, calculate weights by energy, erase minority signs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from twins.families import elect
from twins.shapes import Array, subtract_base


def sce(
    base: Array | None,
    sources: Sequence[Array],
    *,
    select_topk: float = 1.0,
    lambda_: float = 1.0,
    select_without_variance: bool = True,
    uniform_below: float = 0.0,
    divisor_floor: float = 1e-6,
) -> Array:
    """Return the base plus the energy-weighted mean of the selected entries that agree in sign.

    1. Select: of the entries whose variance over the sources is not 0, the fraction
       ``select_topk`` with the largest; of equals the first. At 1 all entries.
    2. Calculate: a source weighs its mean square over the selected entries, over their sum.
    3. Erase: entries that disagree with the sign of the sum over the sources are left out.

    Args:
        base: Required.
        sources: One or more.
        select_topk: In [0, 1].
        lambda_: A factor on the whole change.
        select_without_variance: Where no entry varies, with one source or equal ones, select all.
            False: none, as mergekit.
        uniform_below: Where the mean squares sum to less, weights are equal; mergekit: 1e-6,
            which common task vectors do not reach.
        divisor_floor: The least sum of agreeing weights that is divided by.

    Source: Wan et al. 2024, FuseChat, arXiv:2408.07990, select, calculate and erase. Over whole models through
    ``shapes.over_model``.
    Differs from mergekit 0.1.5: see ``select_without_variance`` and ``uniform_below``.
    """
    start, tasks = subtract_base(base, sources)
    if start.size == 0:
        return start
    selected = _select(tasks, select_topk, without_variance=select_without_variance)
    chosen = [np.where(selected, task, 0.0) for task in tasks]
    squares = [float(np.mean(task * task)) for task in chosen]
    total = sum(squares)
    if abs(total) < uniform_below:
        weights = [1.0 / len(tasks)] * len(tasks)
    else:
        weights = [square / total if total else 0.0 for square in squares]
    elected = elect(chosen, "total")
    mixed, divisor = np.zeros_like(start), np.zeros_like(start)
    for factor, task in zip(weights, chosen, strict=True):
        agrees = np.sign(task) == elected
        mixed = mixed + np.where(agrees, factor * task, 0.0)
        divisor = divisor + np.where(agrees, factor, 0.0)
    least = divisor_floor if divisor_floor > 0 else np.finfo(np.float64).tiny
    return start + lambda_ * mixed / np.maximum(divisor, least)


def _select(tasks: Sequence[Array], select_topk: float, *, without_variance: bool) -> Array:
    if select_topk >= 1:
        return np.ones(tasks[0].shape, dtype=bool)
    variance = np.var(np.stack(tasks), axis=0).ravel()
    if without_variance and not np.any(variance):
        return np.ones(tasks[0].shape, dtype=bool)
    k = int(np.count_nonzero(variance) * select_topk)
    selected = np.zeros(variance.size, dtype=bool)
    selected[np.argsort(-variance, kind="stable")[:k]] = True
    return selected.reshape(tasks[0].shape)
