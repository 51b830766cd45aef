"""Weighted sums: ``linear``, ``average``, ``task_arithmetic`` and ``passthrough``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from twins.shapes import Array, spread, subtract_base, widen

Schedule = Literal["uniform", "exponential"]


def linear(
    base: Array | None,
    sources: Sequence[Array],
    *,
    weight: float | Sequence[float] = 1.0,
    normalize: bool = True,
) -> Array:
    """Return ``sum_i w_i x_i``, divided by ``sum_i w_i`` if ``normalize``.

    Args:
        base: Not looked at.
        sources: One or more.
        weight: One factor per source.
        normalize: Divide by the sum of the weights; a sum of 0 gives NaN or infinity.

    Source: model soups, arXiv:2203.05482. Agrees with mergekit 0.1.5 ``linear``.
    """
    models = widen(sources)
    weights = spread(weight, len(models))
    total = np.zeros_like(models[0])
    for factor, model in zip(weights, models, strict=True):
        total = total + factor * model
    if not normalize:
        return total
    with np.errstate(divide="ignore", invalid="ignore"):
        return total / np.float64(sum(weights))


def average_weights(count: int, *, schedule: Schedule, decay: float = 1.0) -> list[float]:
    """Return the weights of an average over a run's checkpoints, oldest first; their sum is 1.

    Args:
        count: How many checkpoints.
        schedule: ``uniform``: 1 / count each. ``exponential``: every checkpoint weighs ``decay``
            times what the next, newer one weighs.
        decay: In (0, 1]; 1 is uniform.
    """
    if schedule == "uniform":
        raw = [1.0] * count
    else:
        raw = [float(decay) ** (count - 1 - age) for age in range(count)]
    return [each / sum(raw) for each in raw]


def average(
    base: Array | None,
    sources: Sequence[Array],
    *,
    schedule: Schedule = "uniform",
    decay: float = 1.0,
) -> Array:
    """Return the average of a run's checkpoints, given oldest first, by a schedule of weights.

    Args:
        base: Not looked at.
        sources: One or more, oldest first.
        schedule: See :func:`average_weights`.
        decay: See :func:`average_weights`.

    Source: stochastic and latest weight averaging, arXiv:1803.05407 and arXiv:2209.14981 for the
    uniform average; an exponential moving average truncated to the checkpoints at hand and
    normalised for the other.
    """
    weights = average_weights(len(sources), schedule=schedule, decay=decay)
    return linear(base, sources, weight=weights, normalize=False)


def task_arithmetic(
    base: Array | None,
    sources: Sequence[Array],
    *,
    weight: float | Sequence[float] = 1.0,
    lambda_: float = 1.0,
    normalize: bool = False,
) -> Array:
    """Return ``base + lambda * sum_i w_i (x_i - base)``, over ``sum_i w_i`` if ``normalize``.

    Args:
        base: Required.
        sources: One or more.
        weight: One factor per source.
        lambda_: A factor on the whole change.
        normalize: Divide the change by the sum of the weights; a sum within 1e-8 of 0 counts as 1.

    Source: Ilharco et al. 2023, arXiv:2212.04089, equation 1. Agrees with mergekit 0.1.5 and, at
    ``lambda_`` 1, with PEFT.
    """
    start, tasks = subtract_base(base, sources)
    weights = spread(weight, len(tasks))
    mixed = np.zeros_like(start)
    for factor, task in zip(weights, tasks, strict=True):
        mixed = mixed + factor * task
    if normalize:
        mixed = mixed / (1.0 if abs(sum(weights)) < 1e-8 else sum(weights))
    return start + lambda_ * mixed


def passthrough(
    base: Array | None,
    sources: Sequence[Array],
    *,
    scale: float | None = None,
) -> Array:
    """Return the only source, times ``scale`` if there is one.

    Args:
        base: Not looked at.
        sources: Exactly one.
        scale: A factor.

    Agrees with mergekit 0.1.5 ``passthrough``.
    """
    (model,) = widen(sources)
    return model.copy() if scale is None else model * scale
