"""Pieces as the kernels see them: addresses and types."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from streammerge.engine.pieces import PieceInMemory, Stored
from streammerge.native.library import DTYPE_CODES

Job = TypeVar("Job")

CALLS = 64
"""Most calls that the kernels are given at once."""


@dataclass(frozen=True, slots=True)
class StoredOperand:
    """One model's part of a piece, where it lies in memory."""

    address: int
    """Of its first element."""
    itemsize: int
    """Bytes per element."""
    code: int
    """The kernels' number of its type."""

    @classmethod
    def of(cls, stored: Stored) -> StoredOperand:
        """Return where values lie, whose type the kernels know."""
        return cls(stored.memory.ctypes.data, stored.dtype.itemsize, DTYPE_CODES[stored.dtype])

    def at(self, element: int) -> int:
        """Return the address of an element of the piece."""
        return self.address + element * self.itemsize


def find_operands(piece: PieceInMemory, first: int) -> list[StoredOperand] | None:
    """Return a piece's inputs from model ``first`` on; None if the kernels cannot read them all."""
    inputs = piece.inputs[first:]
    if any(stored is None or stored.dtype not in DTYPE_CODES for stored in inputs):
        return None
    if any(piece.deltas):
        return None
    return [StoredOperand.of(stored) for stored in inputs if stored is not None]


def in_batches(jobs: Sequence[Job]) -> Iterator[Sequence[Job]]:
    """Yield jobs as many at a time as the kernels are given at once."""
    for begin in range(0, len(jobs), CALLS):
        yield jobs[begin : begin + CALLS]
