"""What an interrupted run has left, read again: a resume keeps only bytes that are still what was written.

Between a crash and its resume anything may have happened to the files. The journal has the digests
of all leaves, so what is kept is read and hashed once, and what differs is done again.

Memory: a leaf for each of :data:`_THREADS` threads, the records of some batches of pieces, and what
:class:`~streammerge.checkpoint.recorded.Recorded` has of each piece, before any buffer of the merge is allocated.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from streammerge.checkpoint.digests import DIGEST_BYTES, LEAF_ELEMENTS, leaf_digests
from streammerge.checkpoint.journal import Entry, PieceDone, ScopeFound
from streammerge.checkpoint.recorded import Recorded
from streammerge.engine.progress import OnProgress, ProgressEvent
from streammerge.engine.resuming import WHOLE_MODEL
from streammerge.errors import ResumeError, printable
from streammerge.methods import discover_methods
from streammerge.plan.sweeps import programs_of_plan
from streammerge.plan.types import MergePlan, TensorTask
from streammerge.units import MIB

_THREADS = 2
"""One reads while the other hashes; a core hashes about as fast as a disk reads."""
_BATCH_BYTES = 4 * MIB
"""Pieces that are read as one piece of work; small ones are a few KiB."""
_FORGET_BYTES = 64 * MIB
_SECONDS_BETWEEN_EVENTS = 0.1


_Batch = list[tuple[int, PieceDone]]
"""Pieces with their numbers."""


class Readable(Protocol):
    """A shard as far as it is written."""

    def read_into(self, offset: int, buffer: memoryview) -> bool:
        """Fill the buffer with the bytes at an offset of the file; return whether there are so many."""
        ...

    def forget_cached(self) -> None:
        """Tell the system that what was read will not be read again."""
        ...


def entry_check(plan: MergePlan) -> Callable[[Entry], None]:
    """Return what returns if an entry of a journal can be about a plan.

    It raises a ResumeError if the entry names a tensor, a range or a number of sources or leaves that is
    not the plan's own.
    """
    programs = programs_of_plan(plan, discover_methods()[plan.method])

    def check(entry: Entry) -> None:
        if entry.task >= len(plan.tasks) or (entry.task == WHOLE_MODEL and _is_piece(entry)):
            raise _odd_entry(f"tensor {entry.task} of {len(plan.tasks)}")
        if isinstance(entry, ScopeFound):
            setting = 0 if entry.task == WHOLE_MODEL else plan.tasks[entry.task].setting
            tops = sum(each.ranked for each in programs[setting].rounds) if setting >= 0 else 0
            if len(entry.tops) != tops:
                raise _odd_entry(f"{len(entry.tops)} thresholds, there are {tops}")
        else:
            _check_piece(plan, entry)

    return check


def _check_piece(plan: MergePlan, entry: PieceDone) -> None:
    task = plan.tasks[entry.task]
    where = f"{printable(task.name)} from element {entry.start} on"
    if entry.start % LEAF_ELEMENTS or entry.start + entry.numel > task.numel:
        raise _odd_entry(f"{where}: {entry.numel} elements of {task.numel}")
    leaves = -(-entry.numel // LEAF_ELEMENTS)
    if len(entry.leaves) != 2 * DIGEST_BYTES * leaves:
        found = len(entry.leaves) // (2 * DIGEST_BYTES)
        raise _odd_entry(f"{where}: {found} digests, its leaves are {leaves}")
    sources = len(plan.settings[task.setting].sources) if task.setting >= 0 else 0
    if len(entry.kept) not in {0, sources}:
        raise _odd_entry(f"{where}: numbers per source that are not {sources}")
    if len(entry.tensor_kept) != len(entry.thresholds):
        raise _odd_entry(
            f"{where}: {len(entry.tensor_kept)} counts of {len(entry.thresholds)} thresholds"
        )


def find_unsound(
    plan: MergePlan,
    recorded: Recorded,
    doubtful: NDArray[np.bool_],
    shards: Sequence[Readable],
    on_progress: OnProgress,
) -> NDArray[np.bool_]:
    """Return which pieces have not the bytes any more that were written.

    Args:
        plan: The plan.
        recorded: What the journals hold, all of it checked by :func:`entry_check`.
        doubtful: Which of the pieces to read.
        shards: The output files, by index in the plan's layout.
        on_progress: Told how far the reading is, as the activity ``"check"``.

    Raises:
        OutputError: A file cannot be read.
    """
    unsound = np.zeros(len(recorded), dtype=bool)
    order = _as_they_lie(plan, recorded, np.flatnonzero(doubtful))
    sizes = np.fromiter((task.dtype.itemsize for task in plan.tasks), dtype=np.int64)
    total = int((recorded.numels[order] * sizes[recorded.tasks[order]]).sum())
    reporter = _Reporter(total, on_progress)
    unforgotten = 0

    def settle(batch: _Batch, found: Future[list[int]]) -> None:
        nonlocal unforgotten
        unsound[found.result()] = True
        nbytes = sum(_nbytes(plan, piece) for _, piece in batch)
        unforgotten += nbytes
        if unforgotten >= _FORGET_BYTES:
            unforgotten = 0
            shards[plan.tasks[batch[0][1].task].shard].forget_cached()
        reporter.count(nbytes)

    executor = ThreadPoolExecutor(_THREADS, thread_name_prefix="streammerge-check")
    waiting: deque[tuple[_Batch, Future[list[int]]]] = deque()
    try:
        pieces = zip(order.tolist(), recorded.read(order), strict=True)
        for batch in _iter_batches(plan, pieces):
            waiting.append((batch, executor.submit(_find_unsound, plan, batch, shards)))
            if len(waiting) > 2 * _THREADS:
                settle(*waiting.popleft())
        while waiting:
            settle(*waiting.popleft())
    finally:
        executor.shutdown(cancel_futures=True)
    return unsound


def _as_they_lie(
    plan: MergePlan, recorded: Recorded, which: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return the numbers of some pieces in the order in which they lie in the files."""
    shards = np.fromiter((task.shard for task in plan.tasks), dtype=np.int32)
    offsets = np.fromiter((task.offset for task in plan.tasks), dtype=np.int64)
    tasks = recorded.tasks[which]
    return which[np.lexsort((recorded.starts[which], offsets[tasks], shards[tasks]))]


class _Reporter:
    """Tells now and then how much has been read."""

    def __init__(self, total: int, on_progress: OnProgress) -> None:
        self._total = total
        self._on_progress = on_progress
        self._began = time.perf_counter()
        self._next = 0.0
        self._done = 0

    def count(self, nbytes: int) -> None:
        self._done += nbytes
        seconds = time.perf_counter() - self._began
        if seconds < self._next:
            return
        self._next = seconds + _SECONDS_BETWEEN_EVENTS
        self._on_progress(ProgressEvent.at("check", self._done, self._total, seconds))


def _iter_batches(plan: MergePlan, pieces: Iterable[tuple[int, PieceDone]]) -> Iterator[_Batch]:
    """Cut pieces into runs of some bytes, each in one shard."""
    batch: _Batch = []
    nbytes = 0
    for number, piece in pieces:
        other_shard = batch and plan.tasks[batch[0][1].task].shard != plan.tasks[piece.task].shard
        if other_shard or nbytes >= _BATCH_BYTES:
            yield batch
            batch, nbytes = [], 0
        batch.append((number, piece))
        nbytes += _nbytes(plan, piece)
    if batch:
        yield batch


def _find_unsound(plan: MergePlan, batch: _Batch, shards: Sequence[Readable]) -> list[int]:
    return [number for number, piece in batch if not _is_sound(plan, piece, shards)]


def _is_sound(plan: MergePlan, piece: PieceDone, shards: Sequence[Readable]) -> bool:
    task = plan.tasks[piece.task]
    leaf_nbytes = LEAF_ELEMENTS * task.dtype.itemsize
    memory = memoryview(bytearray(min(leaf_nbytes, _nbytes(plan, piece))))
    start = piece.start * task.dtype.itemsize
    end = start + _nbytes(plan, piece)
    expected = bytes.fromhex(piece.leaves)
    for index, begin in enumerate(range(start, end, leaf_nbytes)):
        leaf = memory[: end - begin]
        if not _read(shards[task.shard], task, begin, leaf):
            return False
        if leaf_digests(leaf, leaf_nbytes) != expected[DIGEST_BYTES * index :][:DIGEST_BYTES]:
            return False
    return True


def _read(shard: Readable, task: TensorTask, begin: int, leaf: memoryview) -> bool:
    """Fill a buffer with the bytes of a tensor from ``begin`` on; return whether there are so many."""
    if task.runs is None:
        return shard.read_into(task.offset + begin, leaf)
    return all(
        shard.read_into(task.offset + place, leaf[low:high])
        for place, low, high in task.runs.spans(begin, len(leaf))
    )


def _nbytes(plan: MergePlan, piece: PieceDone) -> int:
    return piece.numel * plan.tasks[piece.task].dtype.itemsize


def _is_piece(entry: Entry) -> bool:
    return isinstance(entry, PieceDone)


def _odd_entry(what: str) -> ResumeError:
    return ResumeError(
        f"the journal of the unfinished merge speaks of {what}, which is not this merge; give "
        "--overwrite to start anew"
    )
