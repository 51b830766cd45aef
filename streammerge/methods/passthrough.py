"""Passthrough: one source as it is, or times a number.

Source: mergekit 0.1.5 ``passthrough``.
"""

from __future__ import annotations

from dataclasses import dataclass

from streammerge.methods.base import MergeMethod, Operand, Work, parameter
from streammerge.methods.families import times
from streammerge.recipe.types import ParameterKind, ParameterSpec, Semantics
from streammerge.tiles.writing import Row, Sheet

SCALE = ParameterSpec(
    name="scale",
    kind=ParameterKind.FLOAT,
    doc="Factor of the source.",
    default=1.0,
    per_source=True,
)


@dataclass(frozen=True, slots=True)
class PassthroughParams:
    """Parameters of ``passthrough``."""

    scale: tuple[float, ...] = parameter(SCALE)
    """Factor of the source."""


def passthrough(params: PassthroughParams) -> Work:
    """Return ``scale x``."""

    def merge(sheet: Sheet) -> Row:
        (model,) = sheet.values
        return times(model, params.scale[0])

    return Work(merge)


METHODS = (
    MergeMethod(
        name="passthrough",
        summary="One source as it is, or times a number.",
        reference="mergekit",
        params=PassthroughParams,
        operand=Operand.WEIGHTS,
        work=passthrough,
        semantics=(Semantics.MERGEKIT,),
        sources=(1, 1),
        keeps_base=lambda params: params.scale == (1.0,),
        examples=({}, {"scale": 0.5}, {"scale": -1.5}),
    ),
)
