"""Task arithmetic: the base plus a weighted sum of task vectors.

Source: Ilharco et al. 2023, arXiv:2212.04089, equation 1.
Follows: peft.utils.merge_utils.task_arithmetic, on task vectors against the base; with
``rounding: peft``, peft 0.21.2 ``merge_and_unload`` with several adapters, which rounds after each.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from streammerge.methods.base import (
    WEIGHT,
    Locality,
    MergeChunk,
    MergeMethod,
    Operand,
    Sweep,
    parameter,
)
from streammerge.methods.parts import sum_rows, weigh_
from streammerge.native.words import Combine
from streammerge.recipe.types import ParameterKind, ParameterSpec

if TYPE_CHECKING:
    from torch import Tensor


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


def task_arithmetic(chunk: MergeChunk, params: TaskArithmeticParams) -> Tensor:
    """Return ``base + sum_i w_i (x_i - base)``; or adapters added and rounded one by one."""
    if params.rounding == Rounding.PEFT:
        return _merge_in_turn(chunk)
    merged = sum_rows(weigh_(chunk.vectors, params.weight), chunk.scratch[0])
    return chunk.base_plus(merged)


def _merge_in_turn(chunk: MergeChunk) -> Tensor:
    if chunk.base is None:
        raise ValueError("a method on task vectors was run without a base")
    merged = chunk.scratch[0].copy_(chunk.base)
    for source in range(len(chunk.vectors.rows)):
        chunk.steps.step_(merged, source=source)
    return merged


METHODS = (
    MergeMethod(
        name="task_arithmetic",
        summary="Base plus the weighted sum of the task vectors.",
        reference="Ilharco et al. 2023, arXiv:2212.04089",
        params=TaskArithmeticParams,
        operand=Operand.TASK_VECTORS,
        locality=Locality.ELEMENT,
        reduction=lambda _: None,
        apply=task_arithmetic,
        scratch_rows=1,
        sums=True,
        sweep=lambda params: (
            Sweep(Combine.SUM, params.weight) if params.rounding == Rounding.ONCE else None
        ),
        in_turn=lambda params: params.rounding == Rounding.PEFT,
        takes_whole=lambda params, source: params.weight[source] == 1,
        examples=({}, {"weight": (0.4, 0.6)}, {"weight": (1.0, -0.5)}),
    ),
)
