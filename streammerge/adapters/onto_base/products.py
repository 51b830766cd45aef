"""Products of an adapter's factors.

In float32 every element is the sum of its terms from the first to the last, each product and each sum
rounded: its bits depend on its row and column alone, on no cut, library or processor. Libraries add in an
order that suits their blocks, and differ in the last bits from one processor to the next.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from streammerge.adapters.onto_base.rows import by_rows
from streammerge.native.library import Kernels, load_kernels
from streammerge.native.machine import TILE_COLUMNS, ChangeCall

if TYPE_CHECKING:
    from torch import Tensor


class ProductKind(Enum):
    """How a product of two factors changes a tensor."""

    ADDED = "added"
    """It is added, element by element."""
    NORMED_ROWS = "normed by rows"
    """It is added; then row i is multiplied by element i of a vector (DoRA)."""
    NORMED_COLUMNS = "normed by columns"
    """Likewise for column i."""
    PLACED = "placed"
    """It is added to some rows of the tensor; or there is one for each matrix of a stack."""


@dataclass(frozen=True, slots=True)
class Product:
    """A product of two stored factors and a number, for whoever computes it elsewhere."""

    up: NDArray[np.float32]
    """B, ``[rows, rank]``; may be a part of what is stored, or its transpose, with strides of its own. Of a
    placed product ``[matrices, rows, rank]``."""
    down: NDArray[np.float32]
    """A, ``[rank, columns]``, likewise, or ``[rank * columns]`` in tiles of columns; see :class:`Tiles`. Of a
    placed product ``[matrices, rank, columns]``."""
    columns: int
    """Columns of A."""
    wide: int
    """Those of a tile; the last one may have fewer."""
    scaling: float
    """Factor of the product."""
    kind: ProductKind = ProductKind.ADDED
    """What is done with it."""
    vector: NDArray[np.float32] | None = None
    """DoRA: what each row or column is multiplied by, ``[rows]`` or ``[columns]``; None without."""
    window: tuple[int, int] | None = None
    """Of a placed product: flat index of the first element that it is added to, and past the last; None for all."""

    @property
    def rank(self) -> int:
        """Terms of an element."""
        return int(self.up.shape[-1])

    @property
    def rows(self) -> int:
        """Rows of the matrix, or of each."""
        return int(self.up.shape[-2])


class PlainProduct:
    """The change ``scaling * B @ A`` of a matrix, by the compiled kernels alone."""

    def __init__(
        self, tiles: NDArray[np.float32], up: NDArray[np.float32], columns: int, scaling: float
    ) -> None:
        """Prepare to compute.

        Args:
            tiles: A, ``[rank, columns]``, as :class:`Tiles` lays it out.
            up: B, ``[rows, rank]``.
            columns: Columns of A.
            scaling: Factor of the product.
        """
        self._tiles, self._up = tiles, up
        self._columns = columns
        self._scaling = scaling

    def product(self) -> Product:
        """Return what it is made of."""
        return Product(self._up, self._tiles, self._columns, TILE_COLUMNS, self._scaling)

    def forget(self) -> None:
        """Let go of the factors, so that their memory is free whoever still refers to this."""
        self._tiles = self._up = np.empty((0, 0), dtype=np.float32)

    def call(self, out: NDArray[np.float32], *, adds: bool) -> ChangeCall:
        """Return what the machine must know; all that it points to must live until it has run.

        Args:
            out: Receives elements of the change.
            adds: Whether they are added to what is there.
        """
        return ChangeCall(
            up=self._up.ctypes.data,
            tiles=self._tiles.ctypes.data,
            rank=self._up.shape[1],
            columns=self._columns,
            out=out.ctypes.data,
            scaling=self._scaling,
            adds=adds,
        )


class Tiles:
    """A right factor ``[rank, columns]`` as the machine reads it.

    Its columns are cut into tiles of :data:`~streammerge.native.machine.TILE_COLUMNS`, the last one
    narrower: each is ``[rank, width]``, row after row, and one follows the other. So it takes the memory
    of the matrix, and a block reads what it needs from end to end.
    """

    def __init__(self, flat: NDArray[np.float32], shape: tuple[int, int]) -> None:
        """Take memory for it.

        Args:
            flat: ``[rank * columns]``; receives the tiles.
            shape: ``(rank, columns)``.
        """
        rank, columns = shape
        whole = columns // TILE_COLUMNS
        self._whole = whole * TILE_COLUMNS
        cut = rank * self._whole
        self._tiles = flat[:cut].reshape(whole, rank, TILE_COLUMNS)
        self._rest = flat[cut:].reshape(rank, columns - self._whole)
        self._shape = shape

    def ranges(self, most: int) -> Iterator[tuple[int, int]]:
        """Yield the flat ranges in which the matrix may be brought: whole rows, or whole tiles of one.

        Args:
            most: Elements per range, at least a tile's columns.
        """
        rank, columns = self._shape
        if columns > most:
            each, step = columns, most // TILE_COLUMNS * TILE_COLUMNS
        else:
            each = rank * columns
            step = most // max(columns, 1) * columns
        for first in range(0, rank * columns, max(each, 1)):
            for begin in range(first, first + each, step):
                yield begin, min(begin + step, first + each)

    def put(self, begin: int, part: NDArray[np.float32]) -> None:
        """Put one of the :meth:`ranges` in its place."""
        for rows, row, column in by_rows(part, begin, self._shape[1]):
            end = min(column + rows.shape[1], self._whole)
            count = max(end - column, 0) // TILE_COLUMNS
            own = slice(row, row + rows.shape[0])
            tiles = self._tiles[column // TILE_COLUMNS :][:count, own]
            whole = rows[:, : count * TILE_COLUMNS]
            tiles[:] = whole.reshape(rows.shape[0], count, TILE_COLUMNS).swapaxes(0, 1)
            if column + rows.shape[1] > self._whole:
                self._rest[own] = rows[:, count * TILE_COLUMNS :]


class Adder:
    """Adds ``scaling * B @ A`` to elements of a matrix in one pass, by the compiled kernels."""

    def __init__(self, product: Product, kernels: Kernels) -> None:
        """Prepare to add.

        Args:
            product: What is added, its A in a single tile that is contiguous.
            kernels: What adds.
        """
        rank, columns = product.up.shape[1], product.columns
        memory = np.empty(rank * columns, dtype=np.float32)
        Tiles(memory, (rank, columns)).put(0, product.down.reshape(-1))
        self._product = PlainProduct(memory, product.up, columns, product.scaling)
        self._kernels = kernels

    def add_to(self, flat: NDArray[np.float32], start: int) -> None:
        """Add to ``[m]`` elements, from flat index ``start`` of the matrix on."""
        call = self._product.call(flat, adds=True)
        self._kernels.change_range(ctypes.addressof(call), start=start, numel=flat.size)


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
