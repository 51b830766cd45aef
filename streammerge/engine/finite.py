"""NaN and infinity: found with one sum per block, and named when they are there."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from streammerge.dtypes import DType
from streammerge.errors import NonFiniteError
from streammerge.plan.types import MergePlan, TensorTask

_LARGEST = {
    DType.F16: 65504.0,
    DType.F8_E4M3: 448.0,
    DType.F8_E5M2: 57344.0,
    DType.F32: 3.4028234663852886e38,
    DType.BF16: 3.3895313892515355e38,
    DType.F64: 1.7976931348623157e308,
}
"""Largest finite magnitude per output type."""


def check_finite(
    vector: Tensor,
    inputs: Sequence[Tensor | None],
    *,
    plan: MergePlan,
    task: TensorTask,
    start: int,
    begin: int,
    end: int,
) -> None:
    """Raise if a block holds NaN or infinity.

    A sum of squares is finite only if every term is, so one cheap reduction acquits almost every
    block; only a suspect is searched.

    Args:
        vector: ``[m]`` the block in the compute dtype, base already subtracted.
        inputs: The piece in every model, as stored.
        plan: Names the models.
        task: The tensor.
        start: Flat index of the piece's first element.
        begin: First element of the block in the piece.
        end: End of the block in the piece.

    Raises:
        NonFiniteError: With tensor, model, element and value.
    """
    if math.isfinite(float(torch.dot(vector, vector))) or bool(torch.isfinite(vector).all()):
        return
    for model, stored in enumerate(inputs):
        if stored is None:
            continue
        wide = stored[begin:end].to(torch.float64)
        bad = torch.isfinite(wide).logical_not_().nonzero()
        if bad.numel():
            element = int(bad[0])
            place = _place(task, start + begin + element)
            raise NonFiniteError(
                f"{task.name}: {plan.label(model)} holds {float(wide[element])} at {place}; "
                "repair the input, or set `non_finite: keep` to let such values through"
            )
    element = int(torch.isfinite(vector).logical_not_().nonzero()[0])
    raise NonFiniteError(
        f"{task.name}: the difference to the base overflows at "
        f"{_place(task, start + begin + element)}; set `compute_dtype: float64`"
    )


def check_range(merged: Tensor, task: TensorTask, start: int) -> None:
    """Raise if a merged block does not fit the range of its output type.

    Raises:
        NonFiniteError: With tensor, element, value and the type's largest.
    """
    limit = _LARGEST[task.dtype]
    # No term of a sum of squares exceeds the sum: one cheap reduction acquits almost every block.
    if float(torch.dot(merged, merged)) <= min(limit * limit, _LARGEST[DType.F32]):
        return
    beyond = (merged.abs() <= limit).logical_not_().nonzero()
    if beyond.numel() == 0:
        return
    element = int(beyond[0])
    raise NonFiniteError(
        f"{task.name}: the merged value {float(merged[element]):g} at "
        f"{_place(task, start + element)} exceeds {limit:g}, the largest {task.dtype}; choose a "
        "wider output.dtype or smaller weights"
    )


def count_non_finite(inputs: Sequence[Tensor | None], begin: int, end: int) -> int:
    """Return how many values of a block, in all models, are NaN or infinite."""
    return sum(
        end - begin - int(torch.isfinite(stored[begin:end].to(torch.float64)).sum())
        for stored in inputs
        if stored is not None
    )


def _place(task: TensorTask, flat: int) -> str:
    index = [int(i) for i in np.unravel_index(flat, task.shape)] if task.shape else []
    return f"element {index}"
