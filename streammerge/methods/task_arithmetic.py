"""Task arithmetic: the base plus a weighted sum of task vectors.

Source: Ilharco et al. 2023, arXiv:2212.04089, equation 1.
Follows: peft.utils.merge_utils.task_arithmetic, on task vectors against the base.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from streammerge.methods.base import (
    WEIGHT,
    Locality,
    MergeChunk,
    MergeMethod,
    Operand,
    parameter,
)
from streammerge.methods.parts import sum_rows, weigh_


@dataclass(frozen=True, slots=True)
class TaskArithmeticParams:
    """Parameters of ``task_arithmetic``."""

    weight: tuple[float, ...] = parameter(WEIGHT)
    """Factor per source."""


def task_arithmetic(chunk: MergeChunk, params: TaskArithmeticParams) -> Tensor:
    """Return ``base + sum_i w_i (x_i - base)``."""
    merged = sum_rows(weigh_(chunk.vectors, params.weight), chunk.scratch[0])
    return chunk.base_plus(merged)


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
        examples=({}, {"weight": (0.4, 0.6)}, {"weight": (1.0, -0.5)}),
    ),
)
