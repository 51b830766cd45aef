"""Pieces as the machine sees them: addresses and types."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from streammerge.assignment.types import Setting
from streammerge.dtypes import DType
from streammerge.engine.pieces import PieceInMemory, Stored
from streammerge.native.library import DTYPE_CODES
from streammerge.native.machine import ChangeCall

Job = TypeVar("Job")

CALLS = 64
"""Most jobs that the machine is given at once."""


@dataclass(frozen=True, slots=True)
class StoredOperand:
    """One model's part of a piece, where it lies in memory."""

    address: int
    """Of its first element."""
    itemsize: int
    """Bytes per element."""
    code: int
    """The machine's number of its type."""

    @classmethod
    def of(cls, stored: Stored) -> StoredOperand:
        """Return where values lie, whose type the machine knows."""
        return cls(stored.memory.ctypes.data, stored.dtype.itemsize, DTYPE_CODES[stored.dtype])

    def at(self, element: int) -> int:
        """Return the address of an element of the piece."""
        return self.address + element * self.itemsize


@dataclass(frozen=True, slots=True)
class PieceOperands:
    """What the machine reads of a piece."""

    stored: Sequence[StoredOperand] | None
    """The base, if there is one, and the sources; None where every job has others."""
    changes: ctypes.Array[ChangeCall] | None = None
    """What it computes before a job, in the place of some of them."""
    start: int = 0
    """Flat index of the piece's first element in the matrix that changes."""


UNUSED = StoredOperand(0, 0, DTYPE_CODES[DType.F32])
"""A base that nothing loads."""


def find_operands(
    piece: PieceInMemory, setting: Setting, *, loads_base: bool
) -> list[StoredOperand] | None:
    """Return a piece's inputs; None if the machine cannot read them all.

    Args:
        piece: The piece.
        setting: Which models are merged.
        loads_base: Whether the base is loaded.
    """
    if any(piece.deltas):
        return None
    operands = []
    for place, model in enumerate(setting.models):
        stored = piece.inputs[model]
        if setting.has_base and place == 0 and not loads_base:
            operands.append(UNUSED)
        elif stored is None or stored.dtype not in DTYPE_CODES:
            return None
        else:
            operands.append(StoredOperand.of(stored))
    return operands


def in_batches(jobs: Sequence[Job]) -> Iterator[Sequence[Job]]:
    """Yield jobs as many at a time as the machine is given at once."""
    for begin in range(0, len(jobs), CALLS):
        yield jobs[begin : begin + CALLS]
