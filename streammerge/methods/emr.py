"""EMR, the elected part: per entry the largest magnitude among those of the elected sign.

Source: Huang et al. 2024, "EMR-Merging", arXiv:2405.17461, the step Elect; its masks and rescalers
for single tasks are no part of a merged model.
Differs from the authors' code: a sum of zero elects nothing, as the paper's sign says, not minus.
"""

from __future__ import annotations

from dataclasses import dataclass

from streammerge.methods.base import MergeMethod, Operand, Work, parameter
from streammerge.methods.families import LAMBDA, times
from streammerge.tiles.writing import Row, Sheet, maximum, sign, weighted_sum


@dataclass(frozen=True, slots=True)
class EmrParams:
    """Parameters of ``emr_unify``."""

    lambda_: float = parameter(LAMBDA)
    """Factor of the whole change."""


def emr_unify(params: EmrParams) -> Work:
    """Return ``base + lambda s max_i |x_i - base|`` over those of sign ``s``, that of their sum."""

    def merge(sheet: Sheet) -> Row:
        vectors = sheet.task_vectors
        elected = sign(weighted_sum(vectors, [1.0] * len(vectors)))
        largest = maximum(vectors[0] * elected, 0.0)
        for vector in vectors[1:]:
            largest = maximum(vector * elected, largest)
        return sheet.base + times(largest * elected, params.lambda_)

    return Work(merge)


METHODS = (
    MergeMethod(
        name="emr_unify",
        summary="Per entry the largest magnitude among those of the elected sign.",
        reference="Huang et al. 2024, arXiv:2405.17461",
        params=EmrParams,
        operand=Operand.TASK_VECTORS,
        work=emr_unify,
        examples=({}, {"lambda": 0.5}),
    ),
)
