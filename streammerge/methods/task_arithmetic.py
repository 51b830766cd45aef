"""Task arithmetic: the base plus a weighted sum of task vectors.

Source: Ilharco et al. 2023, arXiv:2212.04089, equation 1.
Follows: peft.utils.merge_utils.task_arithmetic, on task vectors against the base; with
``rounding: peft``, peft 0.21.2 ``merge_and_unload`` with several adapters, which rounds after each.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from streammerge.methods.base import WEIGHT, MergeMethod, Operand, Work, parameter
from streammerge.methods.families import LAMBDA, SUM_DIVISOR, added, refuse_divisor
from streammerge.recipe.types import ParameterKind, ParameterSpec, Semantics
from streammerge.tiles.writing import Row, Sheet, changed


class Rounding(StrEnum):
    """When sums are rounded to the base's type."""

    ONCE = "once"
    """At the end."""
    PEFT = "peft"
    """After every adapter, as PEFT's merge_and_unload does."""


ROUNDING = ParameterSpec(
    name="rounding",
    kind=ParameterKind.CHOICE,
    doc="When sums are rounded: once at the end, or after every adapter as merge_and_unload does.",
    default=Rounding.ONCE.value,
    per_source=False,
    choices=tuple(Rounding),
    per_tensor=False,
)


@dataclass(frozen=True, slots=True)
class TaskArithmeticParams:
    """Parameters of ``task_arithmetic``."""

    weight: tuple[float, ...] = parameter(WEIGHT)
    """Factor per source."""
    rounding: str = parameter(ROUNDING)
    """``once`` or ``peft``."""
    divisor: str = parameter(SUM_DIVISOR)
    """``none`` or ``weights``."""
    lambda_: float = parameter(LAMBDA)
    """Factor of the whole change."""


def task_arithmetic(params: TaskArithmeticParams) -> Work:
    """Return ``base + lambda sum_i w_i (x_i - base)``; or adapters added and rounded one by one."""

    def merge(sheet: Sheet) -> Row:
        return added(
            sheet,
            sheet.task_vectors,
            params.weight,
            divisor=params.divisor,
            factor=params.lambda_,
        )

    return Work(_merge_in_turn if params.rounding == Rounding.PEFT else merge)


def _merge_in_turn(sheet: Sheet) -> Row:
    merged = sheet.base
    for source in range(sheet.sources):
        merged = changed(merged, source)
    return merged


METHODS = (
    MergeMethod(
        name="task_arithmetic",
        summary="Base plus the weighted sum of the task vectors.",
        reference="Ilharco et al. 2023, arXiv:2212.04089",
        params=TaskArithmeticParams,
        operand=Operand.TASK_VECTORS,
        work=task_arithmetic,
        refuse=refuse_divisor,
        semantics=(Semantics.PEFT, Semantics.MERGEKIT, Semantics.PAPER),
        sums=True,
        in_turn=lambda params: params.rounding == Rounding.PEFT,
        takes_whole=lambda params, source: (
            params.weight[source] == 1 and params.lambda_ == 1 and params.divisor == "none"
        ),
        examples=(
            {},
            {"weight": (0.4, 0.6)},
            {"weight": (1.0, -0.5)},
            {"weight": (0.5, 0.75), "lambda": 0.5, "divisor": "weights"},
        ),
    ),
)
