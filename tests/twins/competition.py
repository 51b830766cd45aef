"""PCB-Merging: entries compete within their task and across tasks; the best share what is left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from twins.shapes import Array, spread, subtract_base

Cross = Literal["sum", "normalised", "pairwise"]


def pcb(
    base: Array | None,
    sources: Sequence[Array],
    *,
    ratio: float = 0.1,
    clamp: float = 0.0001,
    cross: Cross = "sum",
    weight: float | Sequence[float] = 1.0,
    lambda_: float = 1.0,
) -> Array:
    """Return the base plus the mean of clamped task vectors, weighed by how they compete.

    Of each of N task vectors, with ``norm`` the map of its range onto [0, 1]:

    1. its magnitudes are clamped to their quantiles ``clamp`` and ``1 - clamp``;
    2. within the task an entry scores ``exp(N norm(|clamped|)^2)``;
    3. across tasks it scores ``tanh(tau_i sum_j tau_j)``;
    4. the product, clamped from below to its quantile ``1 - ratio`` and normed, is its weight.

    Args:
        base: Required.
        sources: One or more.
        ratio: About the fraction of each task vector that weighs anything.
        clamp: The quantile at either end.
        cross: ``sum`` as above. ``normalised`` sums ``sign(tau_j) norm(|clamped_j|)`` in place of
            ``tau_j``. ``pairwise`` is ``sum_j tanh`` of products of two of these.
        weight: One factor per source, the paper's lambdas; not part of the divisor.
        lambda_: A factor on the whole change.

    Source: Du et al. 2024, arXiv:2410.02396. Follows the authors' code (duguodong7/pcb-merging):
    ``sum`` with 0.0001 is its ``pcb-merging.py``, ``normalised`` and ``pairwise`` with 0.01 are
    ``vision_source_code/pcb.py`` and ``pcb_ES.py``. The paper has softmaxes in place of exp and
    tanh, no clamps, and weighs by the scores above the quantile as they are. Over whole models,
    as in the code, through ``shapes.over_model``.
    Differs from the code, which gives NaN: where the magnitudes of a task vector have no range,
    all are normed to 0; where the scores have none, those above 0 weigh 1 and others 0.
    """
    start, tasks = subtract_base(base, sources)
    if start.size == 0:
        return start
    total, divisor = np.zeros_like(start), np.zeros_like(start)
    scored = score_tasks(tasks, clamp=clamp, cross=cross)
    for factor, (clamped, score) in zip(spread(weight, len(tasks)), scored, strict=True):
        share = _share(score, ratio)
        total = total + factor * clamped * share
        divisor = divisor + share
    return start + lambda_ * total / np.maximum(divisor, 1e-12)


def score_tasks(tasks: Sequence[Array], *, clamp: float, cross: Cross) -> list[tuple[Array, Array]]:
    """Return each task vector clamped, and its scores: steps 1 to 3 of :func:`pcb`."""
    clamped = [np.sign(task) * _clamp_to_quantiles(np.abs(task), clamp, clamp) for task in tasks]
    normed = [_norm_range(np.abs(task)) for task in clamped]
    withins = [np.exp(len(tasks) * each**2) for each in normed]
    scores = [
        within * _cross_score(source, tasks, normed, cross) for source, within in enumerate(withins)
    ]
    return list(zip(clamped, scores, strict=True))


def _cross_score(
    source: int, tasks: Sequence[Array], normed: Sequence[Array], cross: Cross
) -> Array:
    signed = [np.sign(task) * each for task, each in zip(tasks, normed, strict=True)]
    zeros = np.zeros_like(tasks[0])
    if cross == "sum":
        return np.asarray(np.tanh(tasks[source] * sum(tasks, start=zeros)))
    if cross == "normalised":
        return np.asarray(np.tanh(tasks[source] * sum(signed, start=zeros)))
    return sum((np.tanh(signed[source] * other) for other in signed), start=zeros)


def _clamp_to_quantiles(values: Array, below: float, above: float) -> Array:
    """Clamp to sorted entries ``int(n below)`` and ``int(n (1 - above) - 1)``.

    So with a small ``above`` the largest value becomes the second largest.
    """
    ordered, count = np.sort(values.ravel()), values.size
    low = ordered[min(int(count * below), count - 1)]
    high = ordered[max(int(count * (1 - above) - 1), 0)]
    # The upper limit wins where the two cross, as in torch.clamp.
    return np.asarray(np.minimum(np.maximum(values, low), high))


def _norm_range(values: Array) -> Array:
    low, high = np.min(values), np.max(values)
    return np.zeros_like(values) if low == high else np.asarray((values - low) / (high - low))


def _share(score: Array, ratio: float) -> Array:
    cut = _clamp_to_quantiles(score, 1 - ratio, 0.0)
    if np.min(cut) == np.max(cut):
        return np.where((score >= np.max(cut)) & (score > 0), 1.0, 0.0)
    return _norm_range(cut)
