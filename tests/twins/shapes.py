"""What all twins share: task vectors, values per source, and models as one long array."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Model = Mapping[str, Array]


def widen(arrays: Sequence[Array]) -> list[Array]:
    """Return the arrays in float64, having checked that there is one and that shapes agree."""
    wide = [np.asarray(array, dtype=np.float64) for array in arrays]
    if not wide:
        raise ValueError("no sources")
    if any(array.shape != wide[0].shape for array in wide):
        raise ValueError(f"shapes differ: {[array.shape for array in wide]}")
    return wide


def subtract_base(base: Array | None, sources: Sequence[Array]) -> tuple[Array, list[Array]]:
    """Return the base and the task vectors, source - base, in float64."""
    if base is None:
        raise ValueError("this method needs a base")
    start, *models = widen([base, *sources])
    if not models:
        raise ValueError("no sources")
    return start, [model - start for model in models]


def spread(value: float | Sequence[float], count: int) -> list[float]:
    """Return one value per source."""
    values = list(value) if isinstance(value, Sequence) else [value] * count
    if len(values) != count:
        raise ValueError(f"{len(values)} values for {count} sources")
    return [float(each) for each in values]


def norm(array: Array) -> float:
    """Return the Euclidean norm of all entries; 0 of an empty array."""
    return float(np.sqrt(np.sum(array * array)))


def dot(one: Array, other: Array) -> float:
    """Return the sum of products of all entries."""
    return float(np.sum(one * other))


def join_model(model: Model) -> Array:
    """Return all tensors of a model, in the order of their names, as one long array."""
    return np.concatenate([np.asarray(model[name], np.float64).ravel() for name in sorted(model)])


def part_model(values: Array, like: Model) -> dict[str, Array]:
    """Return the model of which :func:`join_model` gives these values."""
    parts, begin = {}, 0
    for name in sorted(like):
        numel = np.asarray(like[name]).size
        parts[name] = values[begin : begin + numel].reshape(np.shape(like[name]))
        begin += numel
    return parts


def over_model(
    method: Callable[..., Array], base: Model, sources: Sequence[Model], **parameters: object
) -> dict[str, Array]:
    """Return what a twin makes of whole models that are taken as one tensor each.

    The order is that of sorted names, then row-major, as in the authors' codes.
    """
    merged = method(join_model(base), [join_model(source) for source in sources], **parameters)
    return part_model(merged, base)
