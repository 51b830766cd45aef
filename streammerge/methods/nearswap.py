"""NearSwap: the base, moved towards the one source the more the nearer they are.

Source: mergekit 0.1.5 ``nearswap``.
"""

from __future__ import annotations

from dataclasses import dataclass

from streammerge.methods.base import Law, MergeMethod, Operand, Work, parameter
from streammerge.recipe.types import ParameterKind, ParameterSpec, Semantics
from streammerge.tiles.writing import Row, Sheet, fill, maximum, minimum

_SMALLEST_GAP = 1e-6
"""Distances below count as this."""

T = ParameterSpec(
    name="t",
    kind=ParameterKind.FLOAT,
    doc="The distance up to which the source replaces the base.",
    default=None,
    per_source=False,
    minimum=0.0,
)


@dataclass(frozen=True, slots=True)
class NearswapParams:
    """Parameters of ``nearswap``."""

    t: float = parameter(T)
    """The distance up to which the source replaces the base."""


def nearswap(params: NearswapParams) -> Work:
    """Return ``base + w (x - base)`` with ``w = min(t / |x - base|, 1)``, not below 0."""

    def merge(sheet: Sheet) -> Row:
        (change,) = sheet.task_vectors
        share = fill(params.t) / maximum(abs(change), _SMALLEST_GAP)
        return sheet.base + change * minimum(maximum(share, 0.0), 1.0)

    return Work(merge)


METHODS = (
    MergeMethod(
        name="nearswap",
        summary="Moves the base towards one source, the more the nearer they are.",
        reference="mergekit",
        params=NearswapParams,
        operand=Operand.TASK_VECTORS,
        work=nearswap,
        semantics=(Semantics.MERGEKIT,),
        sources=(1, 1),
        examples=({"t": 0.1}, {"t": 0.0}, {"t": 1e-4}),
        waived={Law.SCALING: "how much is swapped depends on the distance"},
    ),
)
