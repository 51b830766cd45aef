"""NuSLERP: the point on the arc between two sources, or between their task vectors.

Source: mergekit 0.1.5; the arc is Shoemake's, 1985, "Animating rotation with quaternion curves".
Differs from mergekit: the way is straight where the squared sine is at most 1e-12, instead of 1e-16,
with which rounding decides which way opposite tensors take; ``axis`` has the names of what it does,
where ``nuslerp_row_wise`` takes columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np

from streammerge.lazily import torch
from streammerge.methods.base import WEIGHT, Law, MergeMethod, Operand, Work, parameter
from streammerge.methods.gram import Gram, gram_round, gram_row_round
from streammerge.recipe.types import ParameterKind, ParameterSpec, Semantics
from streammerge.tiles.writing import Row, Sheet, weighted_sum

if TYPE_CHECKING:
    from torch import Tensor

_SMALLEST_NORM = 1e-7
_STRAIGHT_BELOW = 1e-12
_LEAST_SUM = 1e-6


class Axis(StrEnum):
    """What has an angle of its own."""

    TENSOR = "tensor"
    """The tensor."""
    ROWS = "rows"
    """Every vector along the last dimension."""
    COLUMNS = "columns"
    """Every vector along the first dimension; the tensor must fit the memory, several times over."""


AXIS = ParameterSpec(
    name="axis",
    kind=ParameterKind.CHOICE,
    doc="What has an angle of its own: the tensor, or every vector along its last or first dimension.",
    default=Axis.TENSOR.value,
    per_source=False,
    choices=tuple(Axis),
)


@dataclass(frozen=True, slots=True)
class NuslerpParams:
    """Parameters of ``nuslerp``."""

    weight: tuple[float, ...] = parameter(WEIGHT)
    """Factor per source; only their ratio matters."""
    axis: str = parameter(AXIS)
    """``tensor``, ``rows`` or ``columns``."""


def nuslerp(params: NuslerpParams) -> Work:
    """Return the point at ``w_2 / (w_1 + w_2)`` on the arc, plus the base if there is one."""
    first, second = params.weight
    t = 0.5 if abs(first + second) < _LEAST_SUM else second / (first + second)
    axis = Axis(params.axis)
    if axis is Axis.COLUMNS:
        return Work(_add_base, whole=lambda vectors: _along_columns(vectors, t))
    by_rows = axis is Axis.ROWS

    def ends(sheet: Sheet) -> Sequence[Row]:
        return sheet.vectors

    def merge(sheet: Sheet) -> Row:
        number = sheet.row_number if by_rows else sheet.number
        merged = weighted_sum(ends(sheet), [number(0), number(1)])
        return sheet.base + merged if sheet.has_base else merged

    if by_rows:
        return Work(merge, row_rounds=(gram_row_round(ends, lambda grams: arcs(grams, t)),))

    def settle(gram: Gram) -> Sequence[float]:
        return [float(each) for each in arcs(gram[None], t)[0]]

    return Work(merge, (gram_round(ends, settle, (t,)),))


def _add_base(sheet: Sheet) -> Row:
    merged = sheet.computed(0)
    return sheet.base + merged if sheet.has_base else merged


def _along_columns(vectors: Sequence[Tensor], t: float) -> Tensor:
    """Return the points on the arcs between vectors along the first dimension."""
    shape = vectors[0].shape
    ends = [vector.double().view(shape[0] if shape else 1, -1) for vector in vectors]
    grams = np.stack([(one * other).sum(dim=0).numpy() for one in ends for other in ends], axis=1)
    of_first, of_second = torch.from_numpy(arcs(grams.reshape(-1, 2, 2), t)).T
    merged: Tensor = ends[0] * of_first + ends[1] * of_second
    return merged.view(shape)


def arcs(grams: Gram, t: float) -> Gram:
    """Return the coefficients of two ends, for the point at ``t`` on the arc between them.

    Args:
        grams: ``[rows, 2, 2]``.
        t: Where on the arc.

    Returns:
        ``[rows, 2]``.
    """
    lengths = np.maximum(np.sqrt(np.diagonal(grams, axis1=1, axis2=2)), _SMALLEST_NORM)
    cosine = np.clip(grams[:, 0, 1] / (lengths[:, 0] * lengths[:, 1]), -1.0, 1.0)
    straight = 1 - cosine * cosine <= _STRAIGHT_BELOW
    angle = np.arccos(cosine)
    sine = np.where(straight, 1.0, np.sin(angle))
    first = np.where(straight, 1 - t, np.sin((1 - t) * angle) / sine)
    second = np.where(straight, t, np.sin(t * angle) / sine)
    return np.stack([first, second], axis=1)


METHODS = (
    MergeMethod(
        name="nuslerp",
        summary="The point on the arc between two sources, or two task vectors.",
        reference="Shoemake 1985; mergekit",
        params=NuslerpParams,
        operand=Operand.EITHER,
        work=nuslerp,
        semantics=(Semantics.MERGEKIT,),
        sources=(2, 2),
        examples=(
            {},
            {"weight": (0.25, 0.75)},
            {"weight": (1.5, -0.5)},
            {"weight": (0.3, 0.6), "axis": "rows"},
            {"weight": (0.3, 0.6), "axis": "columns"},
        ),
        waived={Law.FIXED_POINT: "without a base, equal values are weighed and added"},
    ),
)
