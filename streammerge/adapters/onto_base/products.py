"""Products of an adapter's factors.

In float32 every element is the sum of its terms from the first to the last, each product and each sum
rounded: its bits depend on its row and column alone, on no cut, library or processor. Libraries add in an
order that suits their blocks, and differ in the last bits from one processor to the next. What has to have
torch's bits, since it follows PEFT's rounding, is torch's product.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from streammerge.lazily import torch
from streammerge.native.library import load_kernels

if TYPE_CHECKING:
    from torch import Tensor


class PlainProduct:
    """The change ``scaling * B @ A`` of a matrix, by the compiled kernels alone."""

    def __init__(self, down: NDArray[np.float32], up: NDArray[np.float32], scaling: float) -> None:
        """Prepare to compute.

        Args:
            down: A, ``[rank, columns]``.
            up: B, ``[rows, rank]``.
            scaling: Factor of the product.
        """
        self._down, self._up = down, up
        self._scaling = np.float32(scaling)

    def forget(self) -> None:
        """Let go of the factors, so that their memory is free whoever still refers to this."""
        self._down = self._up = np.empty((0, 0), dtype=np.float32)

    def fill(self, out: NDArray[np.float32], begin: int) -> None:
        """Write some elements of the change.

        Args:
            out: ``[m]``; receives them.
            begin: Flat index of the first.
        """
        kernels = load_kernels()
        assert kernels is not None  # noqa: S101 - the planner looked
        down, up = self._down, self._up
        rank, columns = down.shape
        for at, count, row, column in _cut(begin, out.size, columns):
            width = min(count, columns)
            kernels.product(
                out.ctypes.data + 4 * at,
                (up.ctypes.data + 4 * row * rank, rank, 1),
                (down.ctypes.data + 4 * column, columns, 1),
                rows=count // width,
                rank=rank,
                columns=width,
            )
        with np.errstate(all="ignore"):
            np.multiply(out, self._scaling, out=out)


def _cut(begin: int, numel: int, columns: int) -> Iterator[tuple[int, int, int, int]]:
    """Cut a flat range at the ends of rows: where a part begins, its size, its first row and column.

    Whole rows are one part; before and behind them there may be a part of one.
    """
    done = 0
    while done < numel:
        row, column = divmod(begin + done, columns)
        whole = (numel - done) // columns * columns if column == 0 else 0
        count = whole or min(columns - column, numel - done)
        yield done, count, row, column
        done += count


def multiply(left: Tensor, right: Tensor, out: Tensor, *, like_torch: bool) -> None:
    """Write ``left @ right``.

    Args:
        left: ``[rows, rank]`` in the compute dtype.
        right: ``[rank, columns]``, likewise.
        out: ``[rows, columns]``, contiguous; receives it.
        like_torch: Whether it must have the bits of torch's product; in float64 it has.
    """
    if like_torch or out.dtype is not torch.float32:
        torch.mm(left, right, out=out)
        return
    kernels = load_kernels()
    if kernels is None:
        multiply_in_order(left, right, out)
        return
    kernels.product(
        out.data_ptr(),
        (left.data_ptr(), left.stride(0), left.stride(1)),
        (right.data_ptr(), right.stride(0), right.stride(1)),
        rows=left.shape[0],
        rank=left.shape[1],
        columns=right.shape[1],
    )


def multiply_in_order(left: Tensor, right: Tensor, out: Tensor) -> None:
    """Do the same term by term, in twenty times the time: the plain twin.

    Args:
        left: As for :func:`multiply`.
        right: Likewise.
        out: Likewise.
    """
    out.zero_()
    for term in range(left.shape[1]):
        # Not addcmul_, which rounds once where the processor can.
        product = left[:, term, None] * right[None, term]
        if term:
            out.add_(product)
        else:
            # Not added to zero, by which a negative zero would lose its sign.
            out.copy_(product)
