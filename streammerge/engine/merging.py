"""From a loaded chunk to bytes for the writers.

Memory: one output slot per chunk being merged or written; copies are written from their input slot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from streammerge.assignment.types import Action
from streammerge.engine.buffers import Slot, SlotPool
from streammerge.engine.device import Applied, DeviceStage
from streammerge.engine.encoding import TensorScales
from streammerge.engine.loading import LoadedChunk
from streammerge.engine.pieces import Part, PieceInMemory, Stored
from streammerge.engine.progress import Progress
from streammerge.engine.queues import Outstanding, WorkQueue
from streammerge.engine.writing import Claim, Extent, WriteJob
from streammerge.errors import CheckpointError, printable
from streammerge.plan.chunking import padded
from streammerge.plan.types import MergePlan, find_scale_tasks
from streammerge.statistics.rounds import NOTHING, Found
from streammerge.statistics.surveying import Surveyed

FindStatistics = Callable[[PieceInMemory], Sequence[Found]]
"""Gives the statistics of a piece: one per source, for each of its parts."""


class ChunkMerger:
    """Merges, copies and compares the pieces of chunks; used by all workers."""

    def __init__(
        self,
        plan: MergePlan,
        *,
        outputs: SlotPool,
        writes: WorkQueue[WriteJob],
        outstanding: Outstanding,
        progress: Progress,
    ) -> None:
        """Prepare to merge.

        Args:
            plan: The plan.
            outputs: Output buffers.
            writes: Where finished bytes go.
            outstanding: Told when a chunk is written.
            progress: Counts the time spent waiting for an output buffer.
        """
        self._plan = plan
        self._outputs = outputs
        self._writes = writes
        self._outstanding = outstanding
        self._progress = progress
        self._scale_tasks = find_scale_tasks(plan)

    def merge(
        self,
        stage: DeviceStage,
        loaded: LoadedChunk,
        find_statistics: FindStatistics,
        scales: TensorScales | None = None,
    ) -> None:
        """Turn a loaded chunk into write jobs and let go of it.

        Args:
            stage: The worker's device.
            loaded: The chunk.
            find_statistics: Gives the statistics of a piece: one per source, for each of its parts.
            scales: The scales of the chunk's only tensor, if it is a part of one that becomes codes;
                None for whole tensors, whose scales are found here.
        """
        slots: list[Slot] = []
        merged: list[Extent] = []
        copied: list[Extent] = []
        cursor = 0
        for piece in loaded.pieces:
            task = piece.first.task
            if task.action in (Action.COPY, Action.COPY_IF_EQUAL):
                copied.append(self._copy(piece))
                continue
            if not slots:
                with self._progress.waiting():
                    slots = self._outputs.acquire(1)
            nbytes = piece.numel * task.made_dtype.itemsize
            memory = slots[0].memory[cursor : cursor + nbytes]
            cursor += padded(nbytes)
            out = Stored(memory, task.made_dtype)
            found, applied = _make(stage, piece, find_statistics, out)
            surveyed: Sequence[Surveyed | None] = [None] * len(piece.parts)
            if self._plan.survey and task.action is Action.MERGE:
                surveyed = stage.survey(piece, found, out)
            if task.encoding is not None:
                own = scales or _scales_of_whole(piece, memory)
                memory = _encode(piece, memory, own)
                if scales is None:
                    room = slots[0].memory[cursor : cursor + own.stored.size]
                    cursor += padded(own.stored.size)
                    room[:] = own.stored
                    merged.append(self._scales_extent(own, room.data))
            merged.extend(_extents(piece, memory.data, applied, found, surveyed))
        if copied:
            loaded.hold()
        loaded.release()

        def then() -> None:
            self._outputs.release(slots)
            if copied:
                loaded.release()
            self._outstanding.end()

        self._writes.put(WriteJob((*merged, *copied), then))

    def look(
        self,
        stage: DeviceStage,
        loaded: LoadedChunk,
        find_statistics: FindStatistics,
        scales: TensorScales,
    ) -> None:
        """Merge a part of a tensor for the sake of its scales alone, and let go of it."""
        for piece in loaded.pieces:
            with self._progress.waiting():
                slots = self._outputs.acquire(1)
            memory = slots[0].memory[: piece.numel * piece.first.task.made_dtype.itemsize]
            _make(stage, piece, find_statistics, Stored(memory, piece.first.task.made_dtype))
            scales.look(piece.first.start, memory.view("<f4"))
            self._outputs.release(slots)
        loaded.release()

    def write_scales(self, scales: TensorScales, then: Callable[[], None]) -> None:
        """Send the scales of a tensor to the writers."""
        self._writes.put(WriteJob((self._scales_extent(scales, scales.stored.data),), then))

    def _scales_extent(self, scales: TensorScales, memory: memoryview) -> Extent:
        index = self._scale_tasks[scales.encoding.scales]
        task = self._plan.tasks[index]
        claim = Claim(Part(task, index, 0, task.numel), _COPIED, NOTHING, 0, len(memory))
        return Extent(task.shard, task.offset, memory, (claim,))

    def _copy(self, piece: PieceInMemory) -> Extent:
        copied = find_copied(self._plan, piece)
        return next(_extents(piece, copied.memory.data, [_COPIED], [NOTHING], [None]))


def find_copied(plan: MergePlan, piece: PieceInMemory) -> Stored:
    """Return what is copied of a piece: its only input, or the first one of several that are equal.

    Raises:
        CheckpointError: They are not.
    """
    task = piece.first.task
    present = [(model, each) for model, each in enumerate(piece.inputs) if each is not None]
    (first_model, first), *others = present
    for model, other in others:
        if not np.array_equal(first.memory, other.memory):
            byte = int(np.argmax(first.memory != other.memory))
            element = piece.first.start + byte // task.dtype.itemsize
            raise CheckpointError(
                f"{printable(task.name)}: {task.dtype} values are only copied, but "
                f"{plan.label(first_model or task.base_owner)} and {plan.label(model)} differ at flat "
                f"element {element}; add a rule {{tensors: {task.name!r}, copy: ...}}"
            )
    return first


def _make(
    stage: DeviceStage, piece: PieceInMemory, find_statistics: FindStatistics, out: Stored
) -> tuple[Sequence[Found], list[Applied]]:
    """Fill ``out`` with the values of a piece; return the statistics used, and what it came to."""
    if piece.first.task.action is Action.CONVERT:
        return [NOTHING], [stage.convert(piece, out)]
    found = find_statistics(piece)
    return found, stage.apply(piece, found, out)


def _scales_of_whole(piece: PieceInMemory, memory: NDArray[np.uint8]) -> TensorScales:
    """Return the scales of a tensor whose values are all in memory."""
    scales = TensorScales(piece.first.task)
    scales.look(0, memory.view("<f4"))
    scales.conclude()
    return scales


def _encode(
    piece: PieceInMemory, memory: NDArray[np.uint8], scales: TensorScales
) -> NDArray[np.uint8]:
    """Replace values by their codes, at the beginning of their room; return those."""
    codes = memory[: piece.numel]
    scales.encode(piece.first.start, memory.view("<f4"), codes)
    return codes


_COPIED = Applied(not_finite=0, kept=())


def _extents(
    piece: PieceInMemory,
    memory: memoryview,
    applied: Sequence[Applied],
    found: Sequence[Found],
    surveyed: Sequence[Surveyed | None],
) -> Iterator[Extent]:
    """Say where the parts of a piece go; neighbours in the file go there together."""
    first = 0
    claims: list[Claim] = []
    for (part, begin, end), part_applied, part_found, part_surveyed in zip(
        piece.ranges(), applied, found, surveyed, strict=True
    ):
        itemsize = part.task.dtype.itemsize
        if claims and not _follows(claims[-1].part, part):
            yield _extent(memory, first, claims)
            claims = []
        if not claims:
            first = begin * itemsize
        claims.append(
            Claim(
                part,
                part_applied,
                part_found,
                begin * itemsize - first,
                end * itemsize - first,
                part_surveyed,
            )
        )
    yield _extent(memory, first, claims)


def _follows(before: Part, part: Part) -> bool:
    """Return whether one part of a piece comes right after another one in the output."""
    if before.task.region is not None or part.task.region is not None:
        return False
    end = before.task.offset + (before.start + before.numel) * before.task.dtype.itemsize
    return before.task.shard == part.task.shard and end == part.task.offset


def _extent(memory: memoryview, first: int, claims: Sequence[Claim]) -> Extent:
    part = claims[0].part
    start = part.start * part.task.dtype.itemsize
    inside = memory[first : first + claims[-1].end]
    runs = part.task.runs
    if runs is not None:
        return Extent(part.task.shard, part.task.offset, inside, tuple(claims), runs, start)
    return Extent(part.task.shard, part.task.offset + start, inside, tuple(claims))
