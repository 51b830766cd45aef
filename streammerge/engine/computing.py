"""The files of an earlier result that are nowhere: what is read of them is merged there and then.

Each reading thread has buffers of its own, and merges a few blocks at a time; what it has merged last
stays there, for those who read a little of it and then a little more.

Memory: what :func:`streammerge.plan.fusing.reader_nbytes` says, per reading thread.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from streammerge.assignment.types import Action
from streammerge.checkpoint.bytesource import ByteSource
from streammerge.engine.buffers import allocate
from streammerge.engine.compiled.opening import open_cpu_stage
from streammerge.engine.decoding import read_span
from streammerge.engine.factors import FactorCache
from streammerge.engine.merging import find_copied
from streammerge.engine.monitor import Monitor
from streammerge.engine.pieces import PieceInMemory, Stored, view_pieces
from streammerge.engine.progress import Progress
from streammerge.errors import StreamMergeError, printable
from streammerge.plan.asking import find_method
from streammerge.plan.chunking import Chunk, Piece, plan_range, plan_reads
from streammerge.plan.fusing import slot_nbytes, step_numel
from streammerge.plan.types import FusedStage, MergePlan, TensorTask
from streammerge.statistics.rounds import NOTHING


class StageComputer:
    """Merges what is asked for of a result that lies in no files; used by all reading threads."""

    def __init__(self, stage: FusedStage, sources: Sequence[ByteSource]) -> None:
        """Prepare to merge.

        Args:
            stage: The recipe, and how it is planned.
            sources: What it reads, by the index of its own plan.
        """
        self._stage = stage
        self._sources = sources
        self._step = step_numel(stage.plan)
        self._factors = FactorCache(
            stage.plan, sources, in_turn=False, monitor=Monitor(), progress=Progress(0)
        )
        self._own = threading.local()

    @property
    def plan(self) -> MergePlan:
        """How the result is made."""
        return self._stage.plan

    def compute(self, index: int, element: int) -> tuple[int, NDArray[np.uint8]]:
        """Return the elements around one of them as the file would hold them, and the first one's index.

        Args:
            index: The tensor's index in the plan.
            element: Flat index of the element.

        Raises:
            StreamMergeError: The inputs cannot be read, or not be merged.
        """
        bench: _Bench | None = getattr(self._own, "bench", None)
        if bench is None:
            bench = self._own.bench = _Bench(self.plan, self._sources, self._factors)
        start = element // self._step * self._step
        try:
            return start, bench.compute(index, start, self._step)
        except StreamMergeError as error:
            note = f"in the recipe named {printable(self._stage.name)}"
            if note not in getattr(error, "__notes__", ()):
                error.add_note(note)
            raise

    def drop(self, index: int, start: int, numel: int) -> None:
        """Tell the inputs that what some elements are made of will not be read again."""
        for entry in self.plan.tasks[index].inputs:
            for span in plan_range(entry, start, numel) if entry is not None else ():
                if not span.is_scattered:
                    self._sources[span.file].drop(span.offset, span.nbytes)


class _Bench:
    """What one reading thread merges with."""

    def __init__(
        self, plan: MergePlan, sources: Sequence[ByteSource], factors: FactorCache
    ) -> None:
        self._plan = plan
        self._sources = sources
        self._factors = factors
        self._stage = open_cpu_stage(plan, find_method(plan.method))
        self._slots = [allocate(slot_nbytes(plan)) for _ in plan.models]
        self._out = allocate(slot_nbytes(plan))
        self._held: tuple[int, int] | None = None
        self._content = self._out[:0]

    def compute(self, index: int, start: int, step: int) -> NDArray[np.uint8]:
        """Return the elements of a tensor from ``start`` on, at most ``step`` of them."""
        if self._held != (index, start):
            # What is there is not what was asked for until it is complete.
            self._held = None
            self._content = self._merge(index, start, step)
            self._held = (index, start)
        return self._content

    def _merge(self, index: int, start: int, step: int) -> NDArray[np.uint8]:
        task = self._plan.tasks[index]
        numel = min(step, task.numel - start)
        models = tuple(model for model, entry in enumerate(task.inputs) if entry is not None)
        chunk = Chunk((Piece(index, start, numel),), models)
        reads = plan_reads(self._plan, chunk)
        slots = self._slots[: len(reads)]
        for read, slot in zip(reads, slots, strict=True):
            for span in read.spans:
                read_span(span, self._sources, slot)
        factors = self._factors.take([index])
        try:
            factors.fill()
            deltas_of = factors.deltas_of
            (piece,) = view_pieces(self._plan, chunk, reads, slots, deltas_of, joined=False)
            return self._make(task, piece)
        finally:
            # Nobody who waits for room holds any.
            factors.release()

    def _make(self, task: TensorTask, piece: PieceInMemory) -> NDArray[np.uint8]:
        if task.action in (Action.COPY, Action.COPY_IF_EQUAL):
            return find_copied(self._plan, piece).memory
        content = self._out[: piece.numel * task.dtype.itemsize]
        out = Stored(content, task.dtype)
        if task.action is Action.CONVERT:
            self._stage.convert(piece, out)
        else:
            self._stage.apply(piece, [NOTHING], out)
        return content


class ComputedSource(ByteSource):
    """A file of a result that lies in no files."""

    def __init__(self, path: Path, computer: StageComputer, shard: int) -> None:
        """Stand for a file.

        Args:
            path: Where it would be.
            computer: Merges what is read of it.
            shard: Its index in the layout of the result.
        """
        self._path = path
        self._computer = computer
        plan = computer.plan
        layout = plan.layout.shards[shard]
        self._nbytes = layout.nbytes
        filled = (index for index in layout.tasks if plan.tasks[index].numel)
        self._tasks = sorted(filled, key=lambda index: plan.tasks[index].offset)
        self._offsets = [plan.tasks[index].offset for index in self._tasks]

    def fingerprint(self) -> tuple[int, int]:
        """Return the size; what it is made of has fingerprints of its own."""
        return self._nbytes, 0

    def was_rewritten(self) -> bool:
        """Nobody can."""
        return False

    def _read_some(self, offset: int, buffer: memoryview) -> int:
        for index, first, behind in self._elements(offset, len(buffer)):
            size = self._computer.plan.tasks[index].dtype.itemsize
            start, content = self._computer.compute(index, first)
            begin = offset - self._computer.plan.tasks[index].offset - start * size
            end = behind * size - start * size
            part = content[begin:end][: len(buffer)]
            buffer[: len(part)] = part.data
            return len(part)
        return 0

    def _elements(self, offset: int, nbytes: int) -> Iterator[tuple[int, int, int]]:
        """Yield the tensors in a range of the file: their index, the first element, the one behind the last."""
        place = bisect_right(self._offsets, offset) - 1
        for index in self._tasks[max(0, place) :]:
            task = self._computer.plan.tasks[index]
            size = task.dtype.itemsize
            first = max(0, offset - task.offset) // size
            behind = min(task.numel, -(-(offset + nbytes - task.offset) // size))
            if behind <= 0:
                return
            if first < behind:
                yield index, first, behind

    def drop(self, offset: int, nbytes: int) -> None:
        """Tell those that it is made of."""
        for index, first, behind in self._elements(offset, nbytes):
            self._computer.drop(index, first, behind - first)

    def close(self) -> None:
        """Do nothing."""
