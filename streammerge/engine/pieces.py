"""What a stage works on: a part of one tensor, or small neighbours side by side, in every input.

Memory: views of slots; values in float64 for those who have to name what is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from streammerge.adapters.onto_base.deltas import Delta
from streammerge.assignment.types import Action
from streammerge.dtypes import DType
from streammerge.floats import KINDS, widen
from streammerge.lazily import torch
from streammerge.plan.chunking import Chunk, ModelRead
from streammerge.plan.types import MergePlan, TensorTask
from streammerge.statistics import BLOCK

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Part:
    """A flat range of one tensor."""

    task: TensorTask
    """The tensor."""
    task_index: int
    """Its index in the plan."""
    start: int
    """First element; a multiple of a block."""
    numel: int
    """Elements."""


@dataclass(frozen=True, slots=True)
class Stored:
    """Values as a file holds them, on the host."""

    memory: NDArray[np.uint8]
    """``[numel * itemsize]``; a view of a slot."""
    dtype: DType
    """Their element type."""

    def tensor(self) -> Tensor:
        """Return them as a tensor, ``[numel]``, of the same memory."""
        return torch.from_numpy(self.memory).view(torch_dtype(self.dtype))

    def widen(self, begin: int, end: int) -> NDArray[np.float64]:
        """Return some of the values, which are floats, in float64."""
        size = self.dtype.itemsize
        raw = self.memory[begin * size : end * size]
        if self.dtype is DType.BF16 or self.dtype in KINDS:
            return widen(raw, self.dtype)
        wide: NDArray[np.float64] = self.tensor()[begin:end].to(torch.float64).numpy()
        return wide


# Compared as the object that it is: a device keeps what it was given until the piece ends.
@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class PieceInMemory:
    """A range of one tensor, or several whole tensors that together are at most one block."""

    parts: tuple[Part, ...]
    """The tensors, in the order in which they lie in memory; all of one setting and one type."""
    inputs: tuple[Stored | None, ...]
    """``[before + numel + behind]`` per model; None where nothing is stored: the model takes no part, or
    is an adapter, to which the base's values belong."""
    deltas: tuple[tuple[Delta, ...], ...] = ()
    """What adapters do to the tensor, per model; empty where none does anything."""
    before: int = 0
    """Elements of its first row that lie before the piece, and are in memory too."""
    behind: int = 0
    """Elements of its last row that lie behind the piece, likewise."""

    def in_rows(self) -> PieceInMemory:
        """Return the piece with all of its first and last row."""
        (part,) = self.parts
        wide = Part(
            part.task,
            part.task_index,
            part.start - self.before,
            part.numel + self.before + self.behind,
        )
        return PieceInMemory((wide,), self.inputs, self.deltas)

    @property
    def first(self) -> Part:
        """The only part, or the first of several."""
        return self.parts[0]

    @property
    def numel(self) -> int:
        """Elements in the piece."""
        return sum(part.numel for part in self.parts)

    def ranges(self) -> Iterator[tuple[Part, int, int]]:
        """Yield every part with its begin and end in the piece."""
        begin = 0
        for part in self.parts:
            yield part, begin, begin + part.numel
            begin += part.numel

    def locate(self, element: int) -> tuple[TensorTask, int]:
        """Return the tensor that an element of the piece belongs to, and its flat index there."""
        part, begin = next((p, b) for p, b, end in self.ranges() if element < end)
        return part.task, part.start + element - begin


def view_pieces(
    plan: MergePlan,
    chunk: Chunk,
    reads: Sequence[ModelRead],
    memories: Sequence[NDArray[np.uint8]],
    deltas_of: Callable[[int, int], tuple[tuple[Delta, ...], ...]],
    *,
    joined: bool,
) -> tuple[PieceInMemory, ...]:
    """Return what a loaded chunk holds.

    Args:
        plan: The plan.
        chunk: The chunk.
        reads: Where its pieces lie in each slot.
        memories: The slots, in the same order.
        deltas_of: Gives what adapters do to a tensor, by its index, for a number of models.
        joined: Whether small neighbours become one piece, since every operation on a piece costs
            as much as some ten thousand elements.
    """
    view = _ChunkView(plan, chunk, reads, memories, deltas_of)
    pieces = []
    begin = 0
    while begin < len(chunk.pieces):
        end = view.end_of_neighbours(begin) if joined else begin + 1
        pieces.append(view.piece(begin, end))
        begin = end
    return tuple(pieces)


class _ChunkView:
    """Where the pieces of a chunk lie."""

    def __init__(
        self,
        plan: MergePlan,
        chunk: Chunk,
        reads: Sequence[ModelRead],
        memories: Sequence[NDArray[np.uint8]],
        deltas_of: Callable[[int, int], tuple[tuple[Delta, ...], ...]],
    ) -> None:
        self._plan = plan
        self._deltas_of = deltas_of
        self._pieces = chunk.pieces
        self._places = {read.model: read.placements for read in reads}
        self._slots = {read.model: memory for read, memory in zip(reads, memories, strict=True)}

    def end_of_neighbours(self, begin: int) -> int:
        """Return the end of the run of pieces, from ``begin`` on, that can be merged as one."""
        plan = self._plan
        first = plan.tasks[self._pieces[begin].task]
        alone = (
            first.changes
            or first.region
            or first.encoding
            or first.row
            or first.whole
            or plan.keep_non_finite
        )
        if first.action is not Action.MERGE or alone:
            return begin + 1
        kind = _kind(first)
        numel = self._pieces[begin].numel
        end = begin + 1
        while end < len(self._pieces):
            numel += self._pieces[end].numel
            task = plan.tasks[self._pieces[end].task]
            if numel > BLOCK or _kind(task) != kind or not self._adjoin(task, end):
                break
            end += 1
        return end

    def _adjoin(self, task: TensorTask, index: int) -> bool:
        """Return whether a piece follows the one before it without a gap, in every slot."""
        before = self._pieces[index - 1].numel
        return all(
            entry is None
            or self._places[model][index]
            == self._places[model][index - 1] + before * entry.dtype.itemsize
            for model, entry in enumerate(task.inputs)
        )

    def piece(self, begin: int, end: int) -> PieceInMemory:
        """Return the pieces from ``begin`` to ``end`` as one."""
        parts = tuple(
            Part(self._plan.tasks[piece.task], piece.task, piece.start, piece.numel)
            for piece in self._pieces[begin:end]
        )
        before, behind = parts[0].task.surroundings(parts[0].start, parts[0].numel)
        numel = before + sum(part.numel for part in parts) + behind
        inputs: list[Stored | None] = []
        for model, entry in enumerate(parts[0].task.inputs):
            if entry is None:
                inputs.append(None)
                continue
            place = self._places[model][begin]
            raw = self._slots[model][place : place + numel * entry.dtype.itemsize]
            inputs.append(Stored(raw, entry.dtype))
        deltas = self._deltas_of(parts[0].task_index, len(inputs))
        return PieceInMemory(parts, tuple(inputs), deltas, before, behind)


def _kind(task: TensorTask) -> tuple[Any, ...]:
    """Return what tensors must share to be merged as one."""
    stored = tuple(entry.dtype if entry else None for entry in task.inputs)
    alone = bool(task.changes or task.region or task.encoding or task.row or task.whole)
    return task.action, task.setting, task.dtype, stored, alone


def torch_dtype(dtype: DType) -> torch.dtype:
    """Return torch's element type of that name."""
    found = getattr(torch, dtype.torch_name)
    assert isinstance(found, torch.dtype)  # noqa: S101 - the table is fixed
    return found
