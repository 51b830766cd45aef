"""Products of an adapter's factors.

In float32 every element is the sum of its terms from the first to the last, each product and each sum
rounded: its bits depend on its row and column alone, on no cut, library or processor. Libraries add in an
order that suits their blocks, and differ in the last bits from one processor to the next.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from streammerge.adapters.onto_base.rows import by_rows
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
        for part, row, column in by_rows(out, begin, columns):
            kernels.product(
                part.ctypes.data,
                (up.ctypes.data + 4 * row * rank, rank, 1),
                (down.ctypes.data + 4 * column, columns, 1),
                rows=part.shape[0],
                rank=rank,
                columns=part.shape[1],
            )
        with np.errstate(all="ignore"):
            np.multiply(out, self._scaling, out=out)


def multiply(left: Tensor, right: Tensor, out: Tensor) -> None:
    """Write ``left @ right``.

    Args:
        left: ``[rows, rank]`` in float32.
        right: ``[rank, columns]``, likewise.
        out: ``[rows, columns]``, contiguous; receives it.
    """
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
