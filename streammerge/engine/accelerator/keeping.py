"""Inputs of pieces that stay on a device between measuring and merging, so that they cross the bus once.

A tensor that waits in memory for its thresholds is measured piece by piece, then merged from the same
pieces. Where the device has room, what was copied for the first question is there for all that follow.
Where it has none, a piece is copied again: nothing waits for room, and no byte depends on it.

Memory: the plan's :attr:`~streammerge.plan.types.DeviceResources.kept_pieces` times
:attr:`~streammerge.plan.devices.StepShape.piece_bytes`, taken when it is first needed.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from streammerge.engine.accelerator.backend import Backend, Failure
from streammerge.engine.pieces import PieceInMemory, torch_dtype
from streammerge.plan.devices import KEPT_ALIGNMENT

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(slots=True)
class Kept:
    """The inputs of one piece on a device; used by one worker at a time."""

    inputs: tuple[Tensor | None, ...]
    """``[numel]`` per model, in the stored type; None where nothing is stored."""
    memory: Tensor
    """Where they lie."""
    is_there: bool = False
    """Whether they have been copied."""


@dataclass(slots=True)
class _Entry:
    kept: Kept
    # Whoever lets go of a piece will not merge it any more.
    alive: weakref.ref[PieceInMemory] = field(repr=False)


class KeptPieces:
    """The pieces that one device keeps; shared by its workers."""

    def __init__(self, backend: Backend, pieces: int, nbytes: int) -> None:
        """Keep nothing yet.

        Args:
            backend: The device.
            pieces: Most that are kept at once.
            nbytes: Bytes of the largest.
        """
        self._backend = backend
        self._nbytes = nbytes
        self._pieces = pieces
        self._free: list[Tensor] = []
        self._entries: dict[int, _Entry] = {}
        # A piece may end while its own thread is in here.
        self._lock = threading.RLock()

    def find(self, piece: PieceInMemory) -> Kept | None:
        """Return the inputs of a piece, if they are there."""
        with self._lock:
            entry = self._entries.get(id(piece))
        return entry.kept if entry is not None and entry.kept.is_there else None

    def find_room(self, piece: PieceInMemory) -> Kept | None:
        """Return the inputs of a piece, or room for them; None if there is none."""
        with self._lock:
            entry = self._entries.get(id(piece))
            if entry is not None:
                return entry.kept
            memory = self._take()
            if memory is None:
                return None
            kept = Kept(_laid_out(piece, memory), memory)
            number = id(piece)
            alive = weakref.ref(piece, lambda _: self._forget(number))
            self._entries[number] = _Entry(kept, alive)
            return kept

    def _take(self) -> Tensor | None:
        if self._pieces and not self._free and not self._entries:
            self._free = self._allocate()
        return self._free.pop() if self._free else None

    def _allocate(self) -> list[Tensor]:
        """Return room for as many pieces as the device has memory for, at once."""
        while self._pieces:
            try:
                memory = self._backend.allocate(self._pieces * self._nbytes)
            except Exception as error:
                if self._backend.classify(error) is not Failure.OUT_OF_MEMORY:
                    raise
                # Others have grown meanwhile.
                self._pieces //= 2
            else:
                return list(memory.view(self._pieces, self._nbytes).unbind())
        return []

    def forget(self, piece: PieceInMemory) -> None:
        """Let go of a piece; nothing that uses it is in flight."""
        self._forget(id(piece))

    def _forget(self, number: int) -> None:
        with self._lock:
            entry = self._entries.pop(number, None)
            if entry is not None and self._pieces:
                self._free.append(entry.kept.memory)

    def shrink(self) -> None:
        """Keep nothing more: the device has no memory left. What is in use is given back by its user."""
        with self._lock:
            self._free.clear()
            self._pieces = 0


def _laid_out(piece: PieceInMemory, memory: Tensor) -> tuple[Tensor | None, ...]:
    """Return the places of a piece's inputs, one behind the other."""
    inputs: list[Tensor | None] = []
    begin = 0
    for stored in piece.inputs:
        if stored is None:
            inputs.append(None)
            continue
        place = memory[begin : begin + stored.memory.nbytes]
        inputs.append(place.view(torch_dtype(stored.dtype)))
        begin += -(-stored.memory.nbytes // KEPT_ALIGNMENT) * KEPT_ALIGNMENT
    return tuple(inputs)
