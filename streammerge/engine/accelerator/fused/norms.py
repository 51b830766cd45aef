"""Squares of ``W + scaling * B @ A`` by fused kernels, added up by row or by column as the CPU does.

A block of rows is changed by the kernel that merges would change it by, as if the sum were what is stored; then
its squares are added up. Each step has the CPU's bits: :mod:`streammerge.adapters.onto_base.norms`.

Memory: what it is given.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from streammerge.adapters.onto_base.products import Product, ProductKind
from streammerge.adapters.onto_base.rows import by_rows
from streammerge.dtypes import DType
from streammerge.engine.accelerator.copies import Bytes, StagedCopies
from streammerge.engine.accelerator.fused.factors import numbers_of
from streammerge.engine.accelerator.fused.functions import add_square_columns
from streammerge.engine.accelerator.fused.kernels import kernel_of, launch
from streammerge.engine.accelerator.fused.running import FusedSteps
from streammerge.engine.accelerator.fused.writing import Kind
from streammerge.engine.pieces import torch_dtype
from streammerge.lazily import torch
from streammerge.plan.device_norms import ALIGNMENT
from streammerge.tiles.fusing import Layout
from streammerge.tiles.program import Op, Program, Step

if TYPE_CHECKING:
    from torch import Tensor

    from streammerge.engine.factors import NormWork

_CHANGED = Program((Step(Op.SOURCE, 0, a=0), Step(Op.STORE, 0, a=0)), registers=1, numbers=())
"""A source with what adapters make of it."""
_ROWS_AT_ONCE = 16
"""Rows of a column that are loaded at once."""
_LEAST_COLUMNS = 32
"""Columns of a program instance: few, since each of them goes through all rows."""


class _Room:
    """Memory of a bench, which is laid out anew for each matrix."""

    def __init__(self, memory: Tensor) -> None:
        self._memory = memory
        self._used = 0

    def take(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Return ``[numel]`` behind what was taken before."""
        begin = self._used
        end = begin + numel * dtype.itemsize
        self._used = -(-end // ALIGNMENT) * ALIGNMENT
        return self._memory[begin:end].view(dtype)


class SquaredMatrix:
    """One matrix that goes through a bench, a few rows at a time."""

    def __init__(
        self, work: NormWork, copies: StagedCopies, memory: Tensor, most: int, tile: int
    ) -> None:
        """Lay everything out, and bring the factors.

        Args:
            work: What is to be found.
            copies: What brings it there.
            memory: ``[nbytes]`` uint8 on the device.
            most: Elements that are brought at once.
            tile: Elements per instance of a kernel.
        """
        self._work, self._copies, self._tile = work, copies, tile
        room = _Room(memory)
        self.rows, self._columns = work.product.rows, work.product.columns
        self.step = min(max(1, most // self._columns), self.rows)
        self.totals = room.take(self.rows if work.along_rows else self._columns, torch.float64)
        numel = self.step * self._columns
        self._stored = room.take(numel, torch_dtype(work.dtype))
        self._changed = room.take(numel, torch.float32)
        self._factors = (
            self._bring(work.product.up, room),
            self._bring(work.product.down, room),
            self._bring(_write_constants(work.product)[None], room),
        )
        copies.stream.run(self._clear)

    def _bring(self, side: NDArray[Any], room: _Room) -> Tensor:
        """Copy ``[m, n]``, with any strides; return where it is, row after row."""
        there = room.take(side.size, torch.from_numpy(side).dtype)

        def give(byte: int, staged: Bytes) -> None:
            own = staged.view(side.dtype)
            for part, row, column in by_rows(own, byte // side.itemsize, side.shape[1]):
                count, width = part.shape
                part[:] = side[row : row + count, column : column + width]

        self._copies.bring_from(give, there.view(torch.uint8))
        return there

    def _clear(self) -> None:
        self.totals.zero_()

    def add(self, rows: range) -> None:
        """Enqueue all that is done with some rows."""
        stored = self._stored[: len(rows) * self._columns]
        begin = rows.start * self._columns
        self._copies.bring_from(partial(self._read, begin), stored.view(torch.uint8))
        self._copies.stream.run(partial(self._square, stored, rows))

    def _read(self, begin: int, byte: int, staged: Bytes) -> None:
        itemsize = self._work.dtype.itemsize
        self._work.read(begin + byte // itemsize, len(staged) // itemsize, staged)

    def _square(self, stored: Tensor, rows: range) -> None:
        changed = self._changed[: stored.numel()]
        _add_product(stored, self._factors, changed, rows.start * self._columns, self._tile)
        table = changed.view(len(rows), self._columns)
        if self._work.along_rows:
            # Each row is what is elsewhere a block.
            own = self.totals[rows.start : rows.stop]
            FusedSteps.total(Op.DOT, changed, None, own, self._columns)
        else:
            square_columns(table, self.totals, self._tile)


def _write_constants(product: Product) -> NDArray[np.int64]:
    """Return what :func:`_add_product` reads beside a product's factors, ``[n]``."""
    layout = Layout(_CHANGED, products=1)
    constants = np.zeros(layout.size, dtype=np.int64)
    constants[layout.factors :] = numbers_of(product, product.rows * product.columns)
    return constants


def _add_product(
    stored: Tensor, factors: tuple[Tensor, Tensor, Tensor], out: Tensor, begin: int, tile: int
) -> None:
    """Enqueue ``out = stored + scaling * B @ A``.

    Args:
        stored: ``[m]``, elements of the matrix, as they are stored.
        factors: B and A, as :class:`~streammerge.adapters.onto_base.products.Product` has them, and
            the constants, all flat.
        out: ``[m]`` float32.
        begin: Flat index of the first element.
        tile: Elements per program instance.
    """
    up, down, constants = factors
    stored_dtype = _DTYPES[stored.dtype]
    own = stored.view(torch.int16) if stored_dtype is DType.BF16 else stored
    launch(
        kernel_of(changing_kind(stored_dtype)),
        -(-out.numel() // tile),
        *(own, own, up, down, out, constants),
        # What this kernel does not touch needs an address all the same.
        *(constants, constants, constants, constants, constants, 16, 16),
        *(begin, out.numel(), out.numel(), tile),
    )


def changing_kind(stored: DType) -> Kind:
    """Return which kernel changes rows that are stored in a type."""
    products = ((ProductKind.ADDED,),)
    return Kind(
        _CHANGED, None, (stored,), DType.F32, DType.F32, 1, False, notes=False, products=products
    )


_DTYPES = {
    torch.float32: DType.F32,
    torch.float64: DType.F64,
    torch.float16: DType.F16,
    torch.bfloat16: DType.BF16,
}


def square_columns(rows: Tensor, totals: Tensor, tile: int) -> None:
    """Enqueue adding the squares of ``[n, columns]`` float32 to totals ``[columns]``, row by row."""
    count, columns = rows.shape
    wide = max(_LEAST_COLUMNS, tile // _LEAST_COLUMNS)
    instances = -(-columns // wide)
    launch(
        add_square_columns, instances, rows, totals, count, columns, wide, _ROWS_AT_ONCE, warps=1
    )
