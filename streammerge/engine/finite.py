"""NaN, infinity and overflow, once a cheap look at a block has shown that there is some: what, where."""

from __future__ import annotations

from typing import TYPE_CHECKING, Never

import numpy as np
from numpy.typing import NDArray

from streammerge.dtypes import DType
from streammerge.engine.pieces import PieceInMemory
from streammerge.errors import NonFiniteError, printable
from streammerge.lazily import torch
from streammerge.plan.types import MergePlan
from streammerge.statistics.topk import Floats

if TYPE_CHECKING:
    from torch import Tensor

LARGEST = {
    DType.F16: 65504.0,
    DType.F8_E4M3: 448.0,
    DType.F8_E5M2: 57344.0,
    DType.F32: 3.4028234663852886e38,
    DType.BF16: 3.3895313892515355e38,
    DType.F64: 1.7976931348623157e308,
}
"""Largest finite magnitude per output type."""


# What is looked at here is not finite: numpy's warnings about that would say nothing new.
@np.errstate(all="ignore")
def refuse_operand(
    vector: Floats, piece: PieceInMemory, begin: int, plan: MergePlan, model: int
) -> Never:
    """Raise the error about an operand that is not finite.

    Args:
        vector: ``[m]`` the block in the compute dtype, base already subtracted.
        piece: The piece, as stored.
        begin: First element of the block in the piece.
        plan: Names the models.
        model: Whose operand it is, as an index into the plan's models.

    Raises:
        NonFiniteError: With tensor, model, element and value.
    """
    for index, stored in enumerate(piece.inputs):
        if stored is None:
            continue
        wide = stored.widen(begin, begin + vector.size)
        bad = _first(~np.isfinite(wide))
        if bad is not None:
            name, place = _place(piece, begin + bad)
            owner = index or piece.locate(begin + bad)[0].base_owner
            raise NonFiniteError(
                f"{name}: {plan.label(owner)} holds {float(wide[bad])} at {place}; "
                "repair the input, or set `non_finite: keep` to let such values through"
            )
    element = _first(~np.isfinite(vector))
    assert element is not None  # noqa: S101 - the caller saw one
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


@np.errstate(all="ignore")
def check_range(merged: Floats, piece: PieceInMemory, begin: int) -> None:
    """Raise if a merged block does not fit the range of its output type.

    Args:
        merged: ``[m]`` the block in the compute dtype.
        piece: The piece.
        begin: First element of the block in the piece.

    Raises:
        NonFiniteError: With tensor, element, value and the type's largest.
    """
    dtype = piece.first.task.made_dtype
    limit = LARGEST[dtype]
    element = _first(~(np.abs(merged) <= limit))
    if element is None:
        return
    name, place = _place(piece, begin + element)
    if np.isnan(merged[element]):
        raise NonFiniteError(
            f"{name}: the merged value at {place} is NaN, though its inputs are finite: on the way a number became too "
            f"large, or two of them cancel; change the weights, or set `compute_dtype: float64`"
        )
    raise NonFiniteError(
        f"{name}: the merged value {float(merged[element]):g} at {place} exceeds {limit:g}, the "
        f"largest {dtype}; choose a wider output.dtype or smaller weights"
    )


def _first(chosen: NDArray[np.bool_]) -> int | None:
    """Return the index of the first element that is set."""
    return int(np.argmax(chosen)) if chosen.any() else None


def _place(piece: PieceInMemory, element: int) -> tuple[str, str]:
    """Return the name of the tensor that an element of the piece belongs to, and where it is."""
    task, flat = piece.locate(element)
    index: list[int] = []
    # Not numpy, which knows at most 64 dimensions, or 32: a file may have more.
    for size in reversed(task.shape):
        flat, place = divmod(flat, size)
        index.insert(0, place)
    return printable(task.name), f"element {index}"


def surely_in_range(merged: Tensor, dtype: DType) -> bool:
    """Return whether one cheap reduction shows that a block is finite and fits a type.

    No term of a sum of squares exceeds the sum; almost every block is acquitted by it.
    """
    limit = LARGEST[dtype]
    return float(torch.dot(merged, merged)) <= min(limit * limit, LARGEST[DType.F32])


def count_stored(piece: PieceInMemory, begin: int, end: int) -> int:
    """Return how many stored values of a block, in all models, are NaN or infinite."""
    return sum(
        count_non_finite(stored.tensor()[begin:end].to(torch.float64))
        for stored in piece.inputs
        if stored is not None
    )


def count_non_finite(values: Tensor) -> int:
    """Return how many values are NaN or infinite."""
    return values.numel() - int(torch.isfinite(values).sum())
