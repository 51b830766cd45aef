"""Karcher mean: the point on the sphere with the least squared distance to all directions.

Source: Grove and Karcher 1973, "How to conjugate C1-close group actions"; gradient descent on the
sphere as in Afsari, Tron and Vidal 2013, arXiv:1201.0925.
Follows: mergekit 0.1.5 ``karcher``: sources weigh alike, the result is as long as they are on average,
and those no longer than ``tol`` have no direction, while their lengths count.
Differs from mergekit: a direction opposite to the mean, to which no way is shorter than others, leaves
it where it is, where rounding chooses a way there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from streammerge.methods.base import MergeMethod, Operand, Work, parameter
from streammerge.methods.gram import Gram, combined, gram_round, norm
from streammerge.methods.refusing import refuse_unless_positive
from streammerge.recipe.types import ParameterKind, ParameterSpec, Semantics
from streammerge.tiles.writing import Row, Sheet

MAX_ITER = ParameterSpec(
    name="max_iter",
    kind=ParameterKind.INT,
    doc="Most steps of the descent.",
    default=10,
    per_source=False,
    minimum=0,
    maximum=10_000,
)
TOL = ParameterSpec(
    name="tol",
    kind=ParameterKind.FLOAT,
    doc="A step that is shorter ends the descent; angles and lengths below it count as none.",
    default=1e-5,
    per_source=False,
)


@dataclass(frozen=True, slots=True)
class KarcherParams:
    """Parameters of ``karcher``."""

    max_iter: int = parameter(MAX_ITER)
    """Most steps."""
    tol: float = parameter(TOL)
    """What counts as nothing."""


def karcher(params: KarcherParams) -> Work:
    """Return the Karcher mean of the sources' directions, as long as they are on average."""

    def models(sheet: Sheet) -> Sequence[Row]:
        return sheet.values

    about = (params.max_iter, params.tol)
    rounds = (gram_round(models, lambda gram: _descend(gram, params), about),)
    return Work(lambda sheet: combined(models(sheet), sheet), rounds)


def _descend(gram: Gram, params: KarcherParams) -> Sequence[float]:
    """Return the coefficients of the models."""
    count, tol = len(gram), params.tol
    lengths = np.sqrt(np.diag(gram))
    units = [np.eye(count)[i] / length for i, length in enumerate(lengths) if length > tol]
    if not units:
        return [0.0] * count
    mean = np.sum(units, axis=0) / len(units)
    mean = units[0] if norm(mean, gram) < tol else mean / norm(mean, gram)
    for _ in range(params.max_iter):
        tangent = _gradient(mean, units, gram, tol)
        size = norm(tangent, gram)
        if size < tol:
            break
        mean = math.cos(size) * mean + math.sin(size) / size * tangent
        if norm(mean, gram) > tol:
            mean /= norm(mean, gram)
    return [float(each) for each in mean * (lengths.sum() / count)]


def _gradient(
    mean: NDArray[np.float64], units: Sequence[NDArray[np.float64]], gram: Gram, tol: float
) -> NDArray[np.float64]:
    """Return the mean of the vectors that lead from a point to each direction along the sphere."""
    tangent = np.zeros(len(gram))
    for unit in units:
        cosine = min(max(float(mean @ gram @ unit), -1.0), 1.0)
        angle, way = math.acos(cosine), unit - cosine * mean
        if angle >= tol and norm(way, gram) > 0:
            tangent += (angle / math.sin(angle)) * way / len(units)
    return tangent


METHODS = (
    MergeMethod(
        name="karcher",
        summary="The Karcher mean of directions on the sphere.",
        reference="Grove and Karcher 1973; arXiv:1201.0925",
        params=KarcherParams,
        operand=Operand.WEIGHTS,
        work=karcher,
        refuse=lambda params: refuse_unless_positive(
            "tol", params.tol, "what is shorter has no direction"
        ),
        semantics=(Semantics.MERGEKIT,),
        examples=({}, {"max_iter": 1}, {"max_iter": 50, "tol": 1e-9}),
    ),
)
