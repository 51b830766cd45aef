"""The factors of adapters on a device, those of one tensor at a time.

Pieces of a tensor follow each other, so a worker brings its factors once and keeps them until another
tensor comes.

Memory: the plan's :attr:`~streammerge.plan.devices.StepShape.factor_bytes` on the device, and
:attr:`~streammerge.plan.devices.StepShape.staged_bytes` page-locked, through which they are copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from streammerge.adapters.onto_base.products import Product, ProductKind
from streammerge.engine.accelerator.ring import Ring
from streammerge.engine.pieces import PieceInMemory
from streammerge.lazily import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class ProductThere:
    """A product of factors that lie on the device."""

    up: Tensor
    """B, ``[rows * rank]``, or one behind the other."""
    down: Tensor
    """A, ``[rank * columns]``, in tiles, likewise."""
    vector: Tensor | None
    """``[rows]`` or ``[columns]``; None where nothing is multiplied by it."""
    kind: ProductKind
    """What is done with it."""
    numbers: tuple[int, ...]
    """What kernels must know of it; see :class:`~streammerge.tiles.fusing.Layout`."""

    @property
    def sides(self) -> tuple[Tensor, ...]:
        """All that lies on the device, in the order that kernels take it."""
        return (self.up, self.down) if self.vector is None else (self.up, self.down, self.vector)


class FactorRoom:
    """Where the factors of one tensor lie."""

    def __init__(self, ring: Ring) -> None:
        """Keep nothing yet."""
        self._ring = ring
        self._task = -1
        self._by_model: tuple[tuple[ProductThere, ...], ...] = ()

    def bring(
        self, piece: PieceInMemory, sources: Sequence[int]
    ) -> tuple[tuple[ProductThere, ...], ...]:
        """Copy what a piece needs and is not there; nothing may be in flight.

        Returns:
            What each source adds; nothing at all where none adds anything.
        """
        if not any(piece.deltas):
            return ()
        if piece.first.task_index != self._task:
            self._task = -1
            self._by_model = self._copied(piece)
            self._task = piece.first.task_index
        return tuple(self._by_model[model] for model in sources)

    def _copied(self, piece: PieceInMemory) -> tuple[tuple[ProductThere, ...], ...]:
        place = 0
        by_model: list[tuple[ProductThere, ...]] = []
        for deltas in piece.deltas:
            own = []
            for delta in deltas:
                product = delta.product()
                assert product is not None  # noqa: S101 - the planner sends no others
                up, place = self._put(product.up, place)
                down, place = self._put(product.down, place)
                vector = None
                if product.vector is not None:
                    vector, place = self._put(product.vector, place)
                numbers = numbers_of(product, piece.first.task.numel)
                own.append(ProductThere(up, down, vector, product.kind, numbers))
            by_model.append(tuple(own))
        return tuple(by_model)

    def _put(self, values: NDArray[np.float32], place: int) -> tuple[Tensor, int]:
        """Copy a factor, row by row; return where it is, and what comes behind."""
        end = place + values.size
        for matrix in values if values.ndim > 2 else (values,):
            self._ring.bring_factor(torch.from_numpy(matrix), place)
            place += matrix.size
        return self._ring.factors[end - values.size : end], end


def numbers_of(product: Product, numel: int) -> tuple[int, ...]:
    """Return what kernels must know of a product, in the order of :class:`~streammerge.tiles.fusing.Layout`.

    Args:
        product: The product.
        numel: Elements of the tensor that it changes.
    """
    scaling = int(np.float64(product.scaling).view(np.int64))
    begin, end = product.window or (0, numel)
    return scaling, product.rank, product.columns, product.wide, product.rows, begin, end
