"""Linear: the weighted average of the models themselves.

Source: Wortsman et al. 2022, "Model soups", arXiv:2203.05482, with weights.
Differs from mergekit: a base is no source; weights whose sum is 0 are refused, not divided by.
"""

from __future__ import annotations

from dataclasses import dataclass

from streammerge.methods.base import WEIGHT, Law, MergeMethod, Operand, Work, parameter
from streammerge.methods.refusing import refuse_sum
from streammerge.recipe.types import ParameterKind, ParameterSpec, Semantics
from streammerge.tiles.writing import Row, Sheet, weighted_sum

NORMALIZE = ParameterSpec(
    name="normalize",
    kind=ParameterKind.BOOL,
    doc="Whether the weighted sum is divided by the sum of the weights.",
    default=True,
    per_source=False,
)


@dataclass(frozen=True, slots=True)
class LinearParams:
    """Parameters of ``linear``."""

    weight: tuple[float, ...] = parameter(WEIGHT)
    """Factor per source."""
    normalize: bool = parameter(NORMALIZE)
    """Divide by the sum of the weights."""


def linear(params: LinearParams) -> Work:
    """Return ``sum_i w_i x_i``, divided by ``sum_i w_i`` when ``normalize`` is set."""

    def merge(sheet: Sheet) -> Row:
        merged = weighted_sum(sheet.values, params.weight)
        return merged / sum(params.weight) if params.normalize else merged

    return Work(merge)


METHODS = (
    MergeMethod(
        name="linear",
        summary="Weighted average of the models.",
        reference="Wortsman et al. 2022, arXiv:2203.05482",
        params=LinearParams,
        operand=Operand.WEIGHTS,
        work=linear,
        refuse=lambda params: (
            refuse_sum(params.weight, "normalize: false") if params.normalize else None
        ),
        semantics=(Semantics.PEFT, Semantics.MERGEKIT, Semantics.PAPER),
        keeps_base=lambda params: params.normalize or sum(params.weight) == 1,
        sums=True,
        examples=(
            {},
            {"weight": (0.25, 0.75)},
            {"weight": (1.5, -0.5), "normalize": False},
        ),
        waived={Law.FIXED_POINT: "in float32 w1 x and w2 x are rounded before they are added"},
    ),
)
