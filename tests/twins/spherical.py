"""Merges on spheres and along chords: slerp, nuslerp, multislerp, karcher, model_stock."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from twins.shapes import Array, dot, norm, spread, subtract_base, widen

Axis = Literal["tensor", "rows", "columns"]
Cancelled = Literal["refuse", "sum"]


def slerp(
    base: Array | None,
    sources: Sequence[Array],
    *,
    t: float,
    colinear_above: float = 0.9995,
    smallest_norm: float = 1e-8,
) -> Array:
    """Return the point at ``t`` on the arc from the base to the only source.

    The angle is between the directions, the sines weigh the tensors as they are. Where the cosine
    is beyond ``colinear_above`` in magnitude, so for opposite tensors too, the way is straight.

    Args:
        base: Required; where ``t`` is 0.
        sources: Exactly one; where ``t`` is 1.
        t: Any number.
        colinear_above: The magnitude of the cosine above which the way is straight.
        smallest_norm: Norms up to this count as 1, so a zero tensor is at a right angle to all.

    Source: Shoemake 1985, Animating rotation with quaternion curves. Agrees with mergekit 0.1.5.
    """
    if base is None:
        raise ValueError("slerp needs a base")
    (source,) = sources
    start, end = widen([base, source])
    lengths = [1.0 if norm(each) <= smallest_norm else norm(each) for each in (start, end)]
    cosine = min(max(dot(start / lengths[0], end / lengths[1]), -1.0), 1.0)
    if abs(cosine) > colinear_above:
        return (1 - t) * start + t * end
    angle = math.acos(cosine)
    return (math.sin((1 - t) * angle) * start + math.sin(t * angle) * end) / math.sin(angle)


def nuslerp(
    base: Array | None,
    sources: Sequence[Array],
    *,
    weight: float | Sequence[float] = 1.0,
    axis: Axis = "tensor",
    smallest_norm: float = 1e-7,
    colinear_below: float = 1e-12,
) -> Array:
    """Return the point at ``w_2 / (w_1 + w_2)`` on the arc between two sources.

    Args:
        base: If there is one, the arc is between the task vectors, and the base is added.
        sources: Exactly two.
        weight: One factor per source; where their sum is within 1e-6 of 0, the midpoint is taken.
        axis: ``tensor``: one angle for the tensor. ``rows``: one for every vector along the last
            dimension. ``columns``: one for every vector along the first dimension.
        smallest_norm: Norms below count as this.
        colinear_below: The squared sine up to which the way is straight; mergekit: 1e-16.

    Agrees with mergekit 0.1.5: ``rows`` is ``nuslerp_flatten: false``, ``columns`` is that with
    ``nuslerp_row_wise: true``.
    Differs from mergekit: the names, which it has the other way round; and its limit is so small
    that rounding decides which way opposite tensors take.
    """
    models = widen(sources)
    if len(models) != 2:
        raise ValueError("nuslerp takes two sources")
    first_weight, second_weight = spread(weight, 2)
    total = first_weight + second_weight
    t = 0.5 if abs(total) < 1e-6 else second_weight / total
    start = np.zeros_like(models[0]) if base is None else widen([base, *models])[0]
    first, second = (model - start for model in models)
    cosine = np.clip(
        _sum_along(
            first
            / np.maximum(np.sqrt(_sum_along(first * first, axis)), smallest_norm)
            * second
            / np.maximum(np.sqrt(_sum_along(second * second, axis)), smallest_norm),
            axis,
        ),
        -1.0,
        1.0,
    )
    straight = 1 - cosine * cosine <= colinear_below
    angle = np.arccos(cosine)
    sine = np.where(straight, 1.0, np.sin(angle))
    of_first = np.where(straight, 1 - t, np.sin((1 - t) * angle) / sine)
    of_second = np.where(straight, t, np.sin(t * angle) / sine)
    return start + of_first * first + of_second * second


def _sum_along(values: Array, axis: Axis) -> Array:
    """Return sums that broadcast against the values."""
    if axis == "tensor" or values.ndim == 0:
        return np.asarray(np.sum(values, keepdims=True))
    return np.asarray(np.sum(values, axis=-1 if axis == "rows" else 0, keepdims=True))


def multislerp(
    base: Array | None,
    sources: Sequence[Array],
    *,
    weight: float | Sequence[float] = 1.0,
    normalize_weights: bool = True,
    eps: float = 1e-8,
    cancelled: Cancelled = "refuse",
    rounding: float = 0.0,
) -> Array:
    """Return a weighted barycentre on the sphere: one step from the projected mean.

    All directions are mapped onto the plane that touches the sphere in the direction of their
    weighted mean, averaged there, and mapped back; the length is the weighted sum of lengths.

    Args:
        base: If there is one, the task vectors are merged, and the base is added.
        sources: One or more; a single one is returned as it is.
        weight: One factor per source.
        normalize_weights: Divide them by their sum.
        eps: Added to norms. A mean shorter than this is no direction.
        cancelled: What more than two directions give that cancel; two give their weighted sum.
        rounding: A mean shorter than this, as part of what it is the sum of, is no direction either.

    Raises:
        ValueError: More than two directions cancel, and are refused. Or weights that are to be
            divided by their sum cancel.

    Agrees with mergekit 0.1.5 ``multislerp``.
    Differs from mergekit: weights that sum to 0 are an error, not NaN.
    """
    models = widen(sources)
    if len(models) == 1:
        return models[0].copy()
    weights = spread(weight, len(models))
    if normalize_weights:
        if sum(weights) == 0:
            raise ValueError("the weights sum to 0")
        weights = [each / sum(weights) for each in weights]
    start = np.zeros_like(models[0]) if base is None else widen([base, *models])[0]
    vectors = [model - start for model in models]
    lengths = [norm(vector) for vector in vectors]
    units = [vector / (length + eps) for vector, length in zip(vectors, lengths, strict=True)]
    mean = np.zeros_like(start)
    for factor, unit in zip(weights, units, strict=True):
        mean = mean + factor * unit
    most = sum(abs(factor) * norm(unit) for factor, unit in zip(weights, units, strict=True))
    if norm(mean) < eps or norm(mean) <= rounding * most:
        if len(models) > 2 and cancelled == "refuse":
            raise ValueError("the directions cancel")
        return start + sum(
            (factor * vector for factor, vector in zip(weights, vectors, strict=True)),
            start=np.zeros_like(start),
        )
    mean = mean / norm(mean)
    tangent = np.zeros_like(start)
    for factor, unit in zip(weights, units, strict=True):
        tangent = tangent + factor * (unit - dot(unit, mean) * mean)
    step = norm(tangent) + eps
    length = sum(factor * each for factor, each in zip(weights, lengths, strict=True))
    return start + (mean * math.cos(step) + tangent * (math.sin(step) / step)) * length


def karcher(
    base: Array | None,
    sources: Sequence[Array],
    *,
    max_iter: int = 10,
    tol: float = 1e-5,
) -> Array:
    """Return the Karcher mean of the directions, as long as the sources are on average.

    Args:
        base: Not looked at.
        sources: One or more, each with the same weight. Sources no longer than ``tol`` have no
            direction; their lengths count nevertheless.
        max_iter: How many steps of gradient descent at most.
        tol: A tangent vector shorter than this ends the descent; angles below are left out.

    Source: Grove and Karcher 1973, How to conjugate C1-close group actions; Afsari 2011 for the
    sphere. Agrees with mergekit 0.1.5 ``karcher``.
    Differs from mergekit: a direction opposite to the mean, within 1e-7, leaves it where it is, for
    no way to it is shorter than others; there rounding chooses one.
    """
    models = widen(sources)
    lengths = [norm(model) for model in models]
    units = [model / length for model, length in zip(models, lengths, strict=True) if length > tol]
    if not units:
        return np.zeros_like(models[0])
    share = 1.0 / len(units)
    mean = sum((share * unit for unit in units), start=np.zeros_like(models[0]))
    mean = units[0] if norm(mean) < tol else mean / norm(mean)
    for _ in range(max_iter):
        tangent = np.zeros_like(mean)
        for unit in units:
            cosine = min(max(dot(mean, unit), -1.0), 1.0)
            angle = math.acos(cosine)
            way = unit - cosine * mean
            if angle >= tol and norm(way) > 1e-7:
                tangent = tangent + share * (angle / math.sin(angle)) * way
        size = norm(tangent)
        if size < tol:
            break
        mean = math.cos(size) * mean + math.sin(size) / size * tangent
        if norm(mean) > tol:
            mean = mean / norm(mean)
    return mean * (sum(lengths) / len(models))


def model_stock(
    base: Array | None, sources: Sequence[Array], *, filter_wise: bool = False
) -> Array:
    """Return the point on the way from the base to the mean that the sources' angles suggest.

    ``t = N c / (1 + (N - 1) c)`` with ``c`` the mean cosine between two task vectors.

    Args:
        base: Required.
        sources: Two or more.
        filter_wise: One ``t`` per vector along the last dimension instead of one per tensor.

    Source: Jang et al. 2024, arXiv:2403.19522, the ratio for N models.
    Agrees with mergekit 0.1.5: norms' products below 1e-6 count as that, a denominator within
    1e-6 of 0 gives 0, and ``t`` may be negative.
    """
    start, tasks = subtract_base(base, sources)
    if len(tasks) < 2:
        raise ValueError("model_stock takes two sources or more")
    rows = start.shape if filter_wise and start.ndim > 1 else (1, start.size)
    flat = [task.reshape(-1, rows[-1] if start.size else 1) for task in tasks]
    cosines = np.zeros((flat[0].shape[0], 1))
    pairs = list(itertools.combinations(flat, 2))
    for one, other in pairs:
        products = np.sum(one * other, axis=1, keepdims=True)
        lengths = np.sqrt(np.sum(one * one, axis=1, keepdims=True)) * np.sqrt(
            np.sum(other * other, axis=1, keepdims=True)
        )
        cosines = cosines + np.clip(products / np.maximum(lengths, 1e-6), -1.0, 1.0)
    cosines = cosines / len(pairs)
    count = len(tasks)
    denominator = 1 + (count - 1) * cosines
    t = np.where(
        np.abs(denominator) < 1e-6,
        0.0,
        count * cosines / np.where(np.abs(denominator) < 1e-6, 1.0, denominator),
    )
    mean = sum(flat, start=np.zeros_like(flat[0])) / count
    return start + (t * mean).reshape(start.shape)
