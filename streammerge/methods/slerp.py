"""SLERP: the point on the arc from the base to the one source.

Source: Shoemake 1985, "Animating rotation with quaternion curves"; the angle is that between whole
tensors.
Follows: mergekit 0.1.5, with its limits: a norm up to 1e-8 counts as 1, and the way is straight where
the cosine is beyond 0.9995 in magnitude, for opposite tensors too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from streammerge.methods.base import Law, MergeMethod, Operand, Work, parameter
from streammerge.methods.gram import Gram, combined, gram_round
from streammerge.recipe.types import ParameterKind, ParameterSpec, Semantics
from streammerge.tiles.writing import Row, Sheet

_STRAIGHT_ABOVE = 0.9995
_SMALLEST_NORM = 1e-8

T = ParameterSpec(
    name="t",
    kind=ParameterKind.FLOAT,
    doc="Where on the arc: 0 is the base, 1 the source.",
    default=None,
    per_source=False,
)


@dataclass(frozen=True, slots=True)
class SlerpParams:
    """Parameters of ``slerp``."""

    t: float = parameter(T)
    """Where on the arc."""


def slerp(params: SlerpParams) -> Work:
    """Return ``(sin((1 - t) a) x_0 + sin(t a) x_1) / sin a``, with ``a`` between base and source."""

    def ends(sheet: Sheet) -> Sequence[Row]:
        return [sheet.base, *sheet.values]

    def settle(gram: Gram) -> Sequence[float]:
        return arc(gram, params.t)

    return Work(
        lambda sheet: combined(ends(sheet), sheet), (gram_round(ends, settle, (params.t,)),)
    )


def arc(gram: Gram, t: float) -> Sequence[float]:
    """Return the coefficients of two ends, for the point at ``t`` on the arc between them."""
    lengths = [math.sqrt(gram[end, end]) for end in (0, 1)]
    scale = math.prod(1.0 if length <= _SMALLEST_NORM else length for length in lengths)
    cosine = min(max(float(gram[0, 1]) / scale, -1.0), 1.0)
    if abs(cosine) > _STRAIGHT_ABOVE:
        return [1 - t, t]
    angle = math.acos(cosine)
    return [math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)]


METHODS = (
    MergeMethod(
        name="slerp",
        summary="The point on the arc from the base to one source.",
        reference="Shoemake 1985",
        params=SlerpParams,
        operand=Operand.TASK_VECTORS,
        work=slerp,
        semantics=(Semantics.MERGEKIT,),
        sources=(1, 1),
        examples=({"t": 0.3}, {"t": 0.0}, {"t": 1.0}, {"t": -0.25}),
        waived={
            Law.FIXED_POINT: "(1 - t) x and t x are rounded before they are added",
        },
    ),
)
