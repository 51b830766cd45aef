"""NuSLERP: the point on the arc between two sources, or between their task vectors.

Source: mergekit 0.1.5; the arc is Shoemake's, 1985, "Animating rotation with quaternion curves".
Differs from mergekit: the way is straight where the squared sine is at most 1e-12, instead of 1e-16,
with which rounding decides which way opposite tensors take; ``axis`` has the names of what it does,
where ``nuslerp_row_wise`` takes columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from streammerge.methods.base import WEIGHT, Law, MergeMethod, Operand, Work, parameter
from streammerge.methods.gram import Gram, combined, gram_round
from streammerge.recipe.types import Semantics
from streammerge.tiles.writing import Row, Sheet

_SMALLEST_NORM = 1e-7
_STRAIGHT_BELOW = 1e-12
_LEAST_SUM = 1e-6


@dataclass(frozen=True, slots=True)
class NuslerpParams:
    """Parameters of ``nuslerp``."""

    weight: tuple[float, ...] = parameter(WEIGHT)
    """Factor per source; only their ratio matters."""


def nuslerp(params: NuslerpParams) -> Work:
    """Return the point at ``w_2 / (w_1 + w_2)`` on the arc, plus the base if there is one."""
    first, second = params.weight
    t = 0.5 if abs(first + second) < _LEAST_SUM else second / (first + second)

    def ends(sheet: Sheet) -> Sequence[Row]:
        return sheet.vectors

    def merge(sheet: Sheet) -> Row:
        merged = combined(ends(sheet), sheet)
        return sheet.base + merged if sheet.has_base else merged

    return Work(merge, (gram_round(ends, lambda gram: arc(gram, t), (t,)),))


def arc(gram: Gram, t: float) -> Sequence[float]:
    """Return the coefficients of two ends, for the point at ``t`` on the arc between them."""
    lengths = [max(math.sqrt(gram[end, end]), _SMALLEST_NORM) for end in (0, 1)]
    cosine = min(max(float(gram[0, 1]) / math.prod(lengths), -1.0), 1.0)
    if 1 - cosine * cosine <= _STRAIGHT_BELOW:
        return [1 - t, t]
    angle = math.acos(cosine)
    return [math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)]


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
        examples=({}, {"weight": (0.25, 0.75)}, {"weight": (1.5, -0.5)}, {"weight": (0.3, 0.6)}),
        waived={Law.FIXED_POINT: "without a base, equal values are weighed and added"},
    ),
)
