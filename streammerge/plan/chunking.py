"""How tensors are cut into chunks, and which bytes each chunk reads.

A chunk is what streams: one aligned piece of a large tensor, or several whole small tensors, in
every input. It takes one buffer (slot) per input. Everything here is arithmetic on the plan, made
anew whenever it is needed, so that a plan stays small.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from streammerge.assignment.types import Action
from streammerge.checkpoint.rowmap import RowMap
from streammerge.checkpoint.types import Coding
from streammerge.checkpoint.views import iter_range
from streammerge.plan.factors import factors_nbytes
from streammerge.plan.types import MergePlan, TensorInput, TensorTask
from streammerge.statistics import BLOCK

_PIECE_ALIGNMENT = 64
"""Pieces start at multiples of this many bytes of a slot: a cache line, and a multiple of every
element size."""


DECODING_BYTES = 2**20
"""Scratch memory of a reader that makes numbers of codes: codes, indices, scales of one step. One that
draws rows takes no more."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A flat range of one tensor."""

    task: int
    """Index into :attr:`MergePlan.tasks`."""
    start: int
    """First element; a multiple of a block."""
    numel: int
    """Elements."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """What goes through the pipeline at once."""

    pieces: tuple[Piece, ...]
    """One piece of a large tensor, or several whole small ones."""
    models: tuple[int, ...]
    """The models that are read; each takes one slot."""


class Residence(StrEnum):
    """How the inputs of a tensor are held."""

    PASSING = "passing"
    """Chunks are independent: each is computed and let go."""
    RESIDENT = "resident"
    """All chunks are kept until the statistics are known; every byte is read once."""
    STREAMED = "streamed"
    """Too large to keep: the statistics sweep reads everything, the merge reads it again. So is every
    tensor of several chunks that becomes codes: one more sweep finds its scales."""


@dataclass(frozen=True, slots=True)
class Unit:
    """A large tensor, or a batch of small ones, with the way it is held."""

    residence: Residence
    """How the inputs are held."""
    chunks: tuple[Chunk, ...]
    """Its chunks in flat order."""


@dataclass(frozen=True, slots=True)
class ReadSpan:
    """A byte range of one input file that lands in one slot."""

    file: int
    """Index into :attr:`MergePlan.files`."""
    offset: int
    """First byte, from the start of the file."""
    nbytes: int
    """Length."""
    slot_offset: int
    """Where the first byte lands in the slot."""
    coding: Coding | None = None
    """How the bytes become numbers, which then begin at :attr:`values_offset`; None for those that are."""
    values_offset: int = 0
    """Where in the slot the first value goes; its codes land in the end of the room of the values."""
    numel: int = 0
    """Values, where they are coded."""
    rows: RowMap | None = None
    """Where the rows of a matrix come from, of which this is the part from :attr:`first` on."""
    first: int = 0
    """Flat index in that matrix of the first element."""

    @property
    def is_scattered(self) -> bool:
        """Whether its bytes lie all over the file."""
        transposed = self.coding is not None and self.coding.transposed_rows > 0
        return transposed or self.rows is not None


@dataclass(frozen=True, slots=True)
class ModelRead:
    """What one slot receives."""

    model: int
    """Index into :attr:`MergePlan.models`."""
    spans: tuple[ReadSpan, ...]
    """What to read, neighbours joined."""
    placements: tuple[int, ...]
    """Byte offset of each piece of the chunk in the slot; -1 where the model has no part."""


def iter_units(plan: MergePlan, *, must_look: Callable[[TensorTask], bool]) -> Iterator[Unit]:
    """Yield all work in order.

    Args:
        plan: The plan.
        must_look: Whether a tensor must be seen whole before it can be merged.
    """
    batch = _Batch(plan)
    for index, task in enumerate(plan.tasks):
        if task.action is Action.SCALES:
            # Made and written with the tensor whose they are.
            continue
        if fits_one_slot(plan, task) and not _is_gathered(task):
            if not batch.fits(task):
                yield from batch.flush()
            batch.add(index, task)
            continue
        yield from batch.flush()
        chunks = tuple(_cut(plan, index, task))
        if task.encoding is not None:
            residence = Residence.STREAMED
        else:
            residence = _residence(plan, chunks) if must_look(task) else Residence.PASSING
        yield Unit(residence, chunks)
    yield from batch.flush()


def _is_gathered(task: TensorTask) -> bool:
    """Return whether a tensor takes memory of its own, however small a part of a slot it is."""
    return task.whole and task.numel > BLOCK


def plan_reads(plan: MergePlan, chunk: Chunk) -> tuple[ModelRead, ...]:
    """Return what each slot of a chunk receives, in the order of :attr:`Chunk.models`."""
    return tuple(_plan_model_read(plan, chunk, model) for model in chunk.models)


def plan_range(entry: TensorInput, start: int, numel: int) -> tuple[ReadSpan, ...]:
    """Return what to read for a flat range of one input, whose values begin at the slot's start."""
    if entry.parts or entry.rows is not None:
        return tuple(_part_spans(entry, start, numel, 0))
    itemsize = entry.dtype.itemsize
    return (ReadSpan(entry.file, entry.offset + start * itemsize, numel * itemsize, 0),)


def chunk_numel(task: TensorTask, slot_bytes: int) -> int:
    """Return the elements of this tensor that one slot holds, in whole blocks."""
    held = slot_bytes // widest_input(task) - most_around(task.row)
    return max(0, held // BLOCK * BLOCK)


def most_around(row: int) -> int:
    """Return the most elements that the first and the last row of a chunk have outside of it."""
    return 2 * (row - 1) if row and BLOCK % row else 0


def around_numel(plan: MergePlan, task: TensorTask) -> int:
    """Return the elements that all chunks of a tensor read beyond their own."""
    if not task.row or fits_one_slot(plan, task):
        return 0
    step = chunk_numel(task, plan.resources.slot_bytes)
    return sum(
        sum(task.surroundings(start, min(step, task.numel - start)))
        for start in range(0, task.numel, step)
    )


def widest_input(task: TensorTask) -> int:
    """Return the largest element size among a tensor's inputs, in bytes."""
    widest = 0
    for entry in task.inputs:
        if entry is not None and entry.dtype.itemsize > widest:
            widest = entry.dtype.itemsize
    return widest or 1


def padded(nbytes: int) -> int:
    """Return the bytes that a piece takes in a slot, up to the start of the next one."""
    return -(-nbytes // _PIECE_ALIGNMENT) * _PIECE_ALIGNMENT


def reads_twice(plan: MergePlan, task: TensorTask) -> bool:
    """Return whether a tensor with statistics of its own is too large to be kept."""
    if fits_one_slot(plan, task):
        return False
    if task.encoding is not None:
        return True
    chunks = -(-task.numel // chunk_numel(task, plan.resources.slot_bytes))
    return chunks * _inputs(task) > plan.resources.slots


def _inputs(task: TensorTask) -> int:
    return sum(entry is not None for entry in task.inputs)


def _residence(plan: MergePlan, chunks: tuple[Chunk, ...]) -> Residence:
    slots = sum(len(chunk.models) for chunk in chunks)
    return Residence.RESIDENT if slots <= plan.resources.slots else Residence.STREAMED


def fits_one_slot(plan: MergePlan, task: TensorTask) -> bool:
    """Return whether a tensor is a single piece."""
    return task.numel * widest_input(task) <= plan.resources.slot_bytes


def _models(task: TensorTask) -> tuple[int, ...]:
    return tuple(index for index, entry in enumerate(task.inputs) if entry is not None)


def _cut(plan: MergePlan, index: int, task: TensorTask) -> Iterator[Chunk]:
    step = chunk_numel(task, plan.resources.slot_bytes)
    for start in range(0, task.numel, step):
        yield Chunk((Piece(index, start, min(step, task.numel - start)),), _models(task))


class _Batch:
    """Collects small tensors until a slot or an output buffer is full."""

    def __init__(self, plan: MergePlan) -> None:
        self._resources = plan.resources
        self._itemsize = plan.compute_dtype.itemsize
        self._clear()

    def _clear(self) -> None:
        self._pieces: list[Piece] = []
        self._models: set[int] = set()
        self._input_bytes = 0
        self._output_bytes = 0
        self._factor_bytes = 0

    def fits(self, task: TensorTask) -> bool:
        input_bytes = self._input_bytes + padded(task.numel * widest_input(task))
        made_bytes = self._output_bytes + output_bytes(task)
        factor_bytes = self._factor_bytes + factors_nbytes(task, self._itemsize)
        return (
            input_bytes <= self._resources.slot_bytes
            and made_bytes <= self._resources.output_slot_bytes
            and factor_bytes <= self._resources.factor_bytes
        )

    def add(self, index: int, task: TensorTask) -> None:
        self._pieces.append(Piece(index, 0, task.numel))
        self._models.update(_models(task))
        self._input_bytes += padded(task.numel * widest_input(task))
        self._output_bytes += output_bytes(task)
        self._factor_bytes += factors_nbytes(task, self._itemsize)

    def flush(self) -> Iterator[Unit]:
        if self._pieces:
            chunk = Chunk(tuple(self._pieces), tuple(sorted(self._models)))
            yield Unit(Residence.PASSING, (chunk,))
        self._clear()


def output_bytes(task: TensorTask) -> int:
    """Return what a small tensor takes of an output slot; copies leave from their input slot.

    What becomes codes is there as numbers first, and its scales are beside it.
    """
    if task.action not in (Action.MERGE, Action.CONVERT):
        return 0
    values = padded(task.numel * task.made_dtype.itemsize)
    if task.encoding is None:
        return values
    return values + padded(task.encoding.scale_numel * task.encoding.scale_dtype.itemsize)


def _plan_model_read(plan: MergePlan, chunk: Chunk, model: int) -> ModelRead:
    spans: list[ReadSpan] = []
    placements = []
    cursor = 0
    # The span that is growing, which becomes an object when it ends: there may be hundreds of
    # tensors in it.
    file, begin, end, slot_offset = -1, 0, 0, 0
    for piece in chunk.pieces:
        entry = plan.tasks[piece.task].inputs[model]
        if entry is None:
            placements.append(-1)
            continue
        itemsize = entry.dtype.itemsize
        before, behind = plan.tasks[piece.task].surroundings(piece.start, piece.numel)
        start, numel = piece.start - before, piece.numel + before + behind
        offset = entry.offset + start * itemsize
        nbytes = numel * itemsize
        if nbytes == 0:
            placements.append(cursor)
            continue
        if entry.parts or entry.rows is not None:
            if end > begin:
                spans.append(ReadSpan(file, begin, end - begin, slot_offset))
            file, begin, end = -1, 0, 0
            cursor = padded(cursor)
            spans += _part_spans(entry, start, numel, cursor)
            placements.append(cursor)
            cursor += nbytes
            continue
        # Neighbours in the file become one request, unless that would misalign the elements.
        if (entry.file, offset) != (file, end) or cursor % itemsize:
            if end > begin:
                spans.append(ReadSpan(file, begin, end - begin, slot_offset))
            cursor = padded(cursor)
            file, begin, slot_offset = entry.file, offset, cursor
        end = offset + nbytes
        placements.append(cursor)
        cursor += nbytes
    if end > begin:
        spans.append(ReadSpan(file, begin, end - begin, slot_offset))
    return ModelRead(model, tuple(spans), tuple(placements))


def _part_spans(entry: TensorInput, start: int, numel: int, place: int) -> Iterator[ReadSpan]:
    """Yield what to read of a tensor in parts or of drawn rows, for a flat range whose values go to ``place``."""
    itemsize = entry.dtype.itemsize
    if entry.rows is not None:
        nbytes = numel * itemsize
        yield ReadSpan(entry.file, entry.offset, nbytes, place, rows=entry.rows, first=start)
        return
    for part in iter_range(entry.parts, start, numel, itemsize):
        room = part.numel * itemsize
        if part.coding is None:
            yield ReadSpan(part.file, part.offset, room, place)
        else:
            nbytes = part.numel * part.coding.bits // 8
            # Of a transposed matrix, the bytes of the range lie all over it.
            yield ReadSpan(
                part.file,
                part.offset,
                nbytes,
                place + room - nbytes,
                part.coding,
                place,
                part.numel,
            )
        place += room
