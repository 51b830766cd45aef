"""Linear: the weighted average of the models themselves.

Source: Wortsman et al. 2022, "Model soups", arXiv:2203.05482, with weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from streammerge.methods.base import (
    WEIGHT,
    Law,
    Locality,
    MergeChunk,
    MergeMethod,
    Operand,
    Sweep,
    parameter,
)
from streammerge.methods.parts import divide_, sum_rows, weigh_
from streammerge.native.words import Combine
from streammerge.recipe.types import ParameterKind, ParameterSpec

if TYPE_CHECKING:
    from torch import Tensor

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


def linear(chunk: MergeChunk, params: LinearParams) -> Tensor:
    """Return ``sum_i w_i x_i``, divided by ``sum_i w_i`` when ``normalize`` is set."""
    merged = sum_rows(weigh_(chunk.vectors, params.weight), chunk.scratch[0])
    return divide_(merged, sum(params.weight)) if params.normalize else merged


def _sweep(params: LinearParams) -> Sweep:
    divisor = sum(params.weight) if params.normalize else 1.0
    return Sweep(Combine.SUM, params.weight, divisor=divisor)


METHODS = (
    MergeMethod(
        name="linear",
        summary="Weighted average of the models.",
        reference="Wortsman et al. 2022, arXiv:2203.05482",
        params=LinearParams,
        operand=Operand.WEIGHTS,
        locality=Locality.ELEMENT,
        reduction=lambda _: None,
        apply=linear,
        scratch_rows=1,
        keeps_base=lambda params: params.normalize or sum(params.weight) == 1,
        sums=True,
        sweep=_sweep,
        examples=(
            {},
            {"weight": (0.25, 0.75)},
            {"weight": (1.5, -0.5), "normalize": False},
        ),
        waived={Law.FIXED_POINT: "in float32 w1 x and w2 x are rounded before they are added"},
    ),
)
