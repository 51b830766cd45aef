"""Multi-SLERP: a weighted mean of directions on the sphere, by one step from the projected mean.

All directions are mapped onto the plane that touches the sphere in the direction of their weighted
mean, averaged there, and mapped back; the length is the weighted sum of lengths.

Source: mergekit 0.1.5; the exponential map of the sphere as in Buss and Fillmore 2001, "Spherical
averages and applications to spherical splines".
Differs from mergekit: weights whose sum is 0 are refused; where more than two directions cancel, which
is an error there, the result is the weighted sum, as it is there for two; and a mean that is no more
than rounding counts as cancelled whatever ``eps`` is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from streammerge.methods.base import WEIGHT, MergeMethod, Operand, Work, parameter
from streammerge.methods.gram import Gram, combined, gram_round, norm
from streammerge.methods.linear import NORMALIZE
from streammerge.methods.refusing import refuse_sum, refuse_unless_positive
from streammerge.recipe.types import ParameterKind, ParameterSpec, Semantics
from streammerge.tiles.writing import Row, Sheet

EPS = ParameterSpec(
    name="eps",
    kind=ParameterKind.FLOAT,
    doc="Is added to lengths; a mean that is shorter has no direction.",
    default=1e-8,
    per_source=False,
)


@dataclass(frozen=True, slots=True)
class MultislerpParams:
    """Parameters of ``multislerp``."""

    weight: tuple[float, ...] = parameter(WEIGHT)
    """Factor per source."""
    normalize: bool = parameter(NORMALIZE)
    """Divide the weights by their sum."""
    eps: float = parameter(EPS)
    """Is added to lengths."""


def multislerp(params: MultislerpParams) -> Work:
    """Return the weighted mean on the sphere, plus the base if there is one."""

    def vectors(sheet: Sheet) -> Sequence[Row]:
        return sheet.vectors

    def merge(sheet: Sheet) -> Row:
        merged = combined(vectors(sheet), sheet)
        return sheet.base + merged if sheet.has_base else merged

    about = (params.weight, params.normalize, params.eps)
    return Work(merge, (gram_round(vectors, lambda gram: _mean(gram, params), about),))


def _refuse(params: MultislerpParams) -> str | None:
    if params.normalize and (reason := refuse_sum(params.weight, "normalize: false")):
        return reason
    return refuse_unless_positive("eps", params.eps, "lengths of 0 are divided by")


def _mean(gram: Gram, params: MultislerpParams) -> Sequence[float]:
    """Return the coefficients of the vectors."""
    count = len(gram)
    if count == 1:
        return [1.0]
    weights = np.array(params.weight)
    if params.normalize:
        weights /= weights.sum()
    lengths = np.sqrt(np.diag(gram))
    units = np.eye(count) / (lengths + params.eps)
    mean = weights @ units
    if norm(mean, gram) < params.eps or norm(mean, gram) == 0:
        return [float(weight) for weight in weights]
    mean /= norm(mean, gram)
    tangent = np.zeros(count)
    for weight, unit in zip(weights, units, strict=True):
        tangent += weight * (unit - (unit @ gram @ mean) * mean)
    step = norm(tangent, gram) + params.eps
    length = float(weights @ lengths)
    found = (mean * math.cos(step) + tangent * (math.sin(step) / step)) * length
    return [float(each) for each in found]


METHODS = (
    MergeMethod(
        name="multislerp",
        summary="A weighted mean of directions on the sphere, in one step.",
        reference="mergekit; Buss and Fillmore 2001",
        params=MultislerpParams,
        operand=Operand.EITHER,
        work=multislerp,
        refuse=_refuse,
        semantics=(Semantics.MERGEKIT,),
        keeps_base=lambda params: params.normalize or sum(params.weight) == 1,
        examples=({}, {"weight": (0.25, 0.75)}, {"weight": (1.5, -0.75), "normalize": False}),
    ),
)
