"""NaN and infinity: found with one sum per block, and named when they are there."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from streammerge.dtypes import DType
from streammerge.engine.pieces import PieceInMemory
from streammerge.errors import NonFiniteError, printable
from streammerge.plan.types import MergePlan

LARGEST = {
    DType.F16: 65504.0,
    DType.F8_E4M3: 448.0,
    DType.F8_E5M2: 57344.0,
    DType.F32: 3.4028234663852886e38,
    DType.BF16: 3.3895313892515355e38,
    DType.F64: 1.7976931348623157e308,
}
"""Largest finite magnitude per output type."""


def check_finite(
    vector: Tensor, piece: PieceInMemory, begin: int, plan: MergePlan, model: int
) -> None:
    """Raise if a block holds NaN or infinity.

    A sum of squares is finite only if every term is, so one cheap reduction acquits almost every
    block; only a suspect is searched.

    Args:
        vector: ``[m]`` the block in the compute dtype, base already subtracted.
        piece: The piece, as stored.
        begin: First element of the block in the piece.
        plan: Names the models.
        model: Whose operand it is, as an index into the plan's models.

    Raises:
        NonFiniteError: With tensor, model, element and value.
    """
    if math.isfinite(float(torch.dot(vector, vector))) or bool(torch.isfinite(vector).all()):
        return
    for index, stored in enumerate(piece.inputs):
        if stored is None:
            continue
        wide = stored[begin : begin + vector.numel()].to(torch.float64)
        bad = torch.isfinite(wide).logical_not_().nonzero()
        if bad.numel():
            element = int(bad[0])
            name, place = _place(piece, begin + element)
            raise NonFiniteError(
                f"{name}: {plan.label(index)} holds {float(wide[element])} at {place}; "
                "repair the input, or set `non_finite: keep` to let such values through"
            )
    element = int(torch.isfinite(vector).logical_not_().nonzero()[0])
    name, place = _place(piece, begin + element)
    if piece.deltas and piece.deltas[model]:
        raise NonFiniteError(
            f"{name}: {plan.label(model)} comes to {float(vector[element])} at {place}, though its "
            "tensors are finite: a product overflows, or DoRA divides by a norm of zero; repair the "
            "adapter, or set `non_finite: keep` to let such values through"
        )
    raise NonFiniteError(
        f"{name}: the difference to the base overflows at {place}; set `compute_dtype: float64`"
    )


def check_range(merged: Tensor, piece: PieceInMemory, begin: int) -> None:
    """Raise if a merged block does not fit the range of its output type.

    Raises:
        NonFiniteError: With tensor, element, value and the type's largest.
    """
    dtype = piece.first.task.dtype
    limit = LARGEST[dtype]
    if surely_in_range(merged, dtype):
        return
    beyond = (merged.abs() <= limit).logical_not_().nonzero()
    if beyond.numel() == 0:
        return
    element = int(beyond[0])
    name, place = _place(piece, begin + element)
    raise NonFiniteError(
        f"{name}: the merged value {float(merged[element]):g} at {place} exceeds {limit:g}, the "
        f"largest {dtype}; choose a wider output.dtype or smaller weights"
    )


def surely_in_range(merged: Tensor, dtype: DType) -> bool:
    """Return whether one cheap reduction shows that a block is finite and fits a type.

    No term of a sum of squares exceeds the sum; almost every block is acquitted by it.
    """
    limit = LARGEST[dtype]
    return float(torch.dot(merged, merged)) <= min(limit * limit, LARGEST[DType.F32])


def count_non_finite(inputs: Sequence[Tensor | None], begin: int, end: int) -> int:
    """Return how many values of a block, in all models, are NaN or infinite."""
    return sum(
        end - begin - int(torch.isfinite(stored[begin:end].to(torch.float64)).sum())
        for stored in inputs
        if stored is not None
    )


def _place(piece: PieceInMemory, element: int) -> tuple[str, str]:
    """Return the name of the tensor that an element of the piece belongs to, and where it is."""
    task, flat = piece.locate(element)
    index: list[int] = []
    # Not numpy, which knows at most 64 dimensions, or 32: a file may have more.
    for size in reversed(task.shape):
        flat, place = divmod(flat, size)
        index.insert(0, place)
    return printable(task.name), f"element {index}"
