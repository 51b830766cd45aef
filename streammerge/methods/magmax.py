"""MagMax: per entry the change of largest magnitude.

Source: Marczak et al. 2024, "MagMax", arXiv:2407.06322, maximum magnitude selection; of equal
magnitudes the last source's is taken, as in the authors' code.
"""

from __future__ import annotations

from dataclasses import dataclass

from streammerge.methods.base import Law, MergeMethod, Operand, Work, parameter
from streammerge.methods.families import LAMBDA, times
from streammerge.tiles.writing import Row, Sheet, where


@dataclass(frozen=True, slots=True)
class MagmaxParams:
    """Parameters of ``magmax``."""

    lambda_: float = parameter(LAMBDA)
    """Factor of the whole change."""


def magmax(params: MagmaxParams) -> Work:
    """Return ``base + lambda (x_i - base)`` with the source whose change is largest."""

    def merge(sheet: Sheet) -> Row:
        chosen, *others = sheet.task_vectors
        for vector in others:
            chosen = where(abs(vector) >= abs(chosen), vector, chosen)
        return sheet.base + times(chosen, params.lambda_)

    return Work(merge)


METHODS = (
    MergeMethod(
        name="magmax",
        summary="Per entry the change of largest magnitude.",
        reference="Marczak et al. 2024, arXiv:2407.06322",
        params=MagmaxParams,
        operand=Operand.TASK_VECTORS,
        work=magmax,
        examples=({}, {"lambda": 0.5}),
        waived={Law.ORDER: "of equal magnitudes the last is taken"},
    ),
)
