"""Factors that a change is computed from, made of the stored ones; see :mod:`.workings`.

What is multiplied out whole is multiplied as the programs do that wrote the files, so that it has
their bits. What the base takes part in is summed in float64 and rounded once.

Memory: what :func:`~streammerge.adapters.workings.working_numel` says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from streammerge.adapters.workings import Op, Working
from streammerge.reductions import BLOCK

if TYPE_CHECKING:
    from torch import Tensor

ReadRows = Callable[[int, int], "Tensor"]
"""Returns rows of the tensor that changes from one index to another, ``[n * columns]``."""


def make_working(working: Working, stored: Sequence[Tensor], read_rows: ReadRows) -> Tensor:
    """Return a factor, ``[rows, columns]`` in the compute dtype.

    Args:
        working: How it is made.
        stored: The change's stored tensors, in the compute dtype and in the shapes that are stored.
        read_rows: Reads the tensor that changes, in the compute dtype.
    """
    parts = [stored[index] for index in working.parts]
    made: Tensor
    match working.op:
        case Op.STORED | Op.TURNED:
            made = view_stored(working, stored)
        case Op.PRODUCT:
            made = parts[0] @ parts[1].reshape(parts[1].shape[0], -1)
        case Op.CORE:
            made = _core(parts[0], parts[1])
        case Op.CORE_PRODUCT:
            made = parts[2].T @ _core(parts[0], parts[1])
        case Op.UNDER:
            made = _under(working, parts[0], parts[1])
        case Op.BASE_PRODUCT:
            made = _base_product(working, parts[0], parts[1], read_rows)
    return made


def view_stored(working: Working, stored: Sequence[Tensor]) -> Tensor:
    """Return a factor that takes no memory of its own."""
    part = stored[working.parts[0]]
    if working.op is Op.TURNED:
        return part.reshape(working.columns, working.rows).T
    return part.reshape(working.rows, working.columns)


def _core(tucker: Tensor, down: Tensor) -> Tensor:
    """Return ``sum_j t[i, j, ...] b[j, r]`` as ``[i, r * ...]``."""
    outer, inner = tucker.shape[:2]
    turned = tucker.reshape(outer, inner, -1).transpose(1, 2).reshape(-1, inner)
    product = turned @ down.reshape(inner, -1)
    return product.reshape(outer, -1, product.shape[1]).transpose(1, 2).reshape(outer, -1)


def _under(working: Working, a2: Tensor, b2: Tensor) -> Tensor:
    rank = b2.shape[0]
    kernel = working.rows // rank - 1
    channels = a2.reshape(rank, -1)
    made = channels.new_zeros(working.rows, working.columns)
    # Row (k, r) holds a2[r] for the element k of the kernel and nothing for the others.
    for element in range(kernel):
        made[element * rank : (element + 1) * rank, element::kernel] = channels
    made[kernel * rank :] = b2.reshape(rank, -1)
    return made


def _base_product(working: Working, a1: Tensor, b1: Tensor, read_rows: ReadRows) -> Tensor:
    rank = b1.shape[1]
    kernel = working.columns // rank - 1
    right = a1.reshape(a1.shape[0], rank).double()
    made = right.new_empty(working.rows, working.columns)
    step = max(1, BLOCK // (right.shape[0] * kernel))
    for begin in range(0, working.rows, step):
        end = min(begin + step, working.rows)
        weights = read_rows(begin, end).view(end - begin, right.shape[0], kernel).double()
        product = weights.transpose(1, 2) @ right
        made[begin:end, : kernel * rank] = product.reshape(end - begin, -1)
    made[:, kernel * rank :] = b1.reshape(working.rows, rank)
    return made.to(b1.dtype)
