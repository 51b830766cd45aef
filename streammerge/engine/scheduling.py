"""What is loaded in which order, and what happens to each chunk once it is there.

    passing    load ─▶ merge ─▶ write                             no statistics, or whole in one chunk
    resident   load all ─▶ sample ─▶ measure (rounds) ─▶ merge    read once
    streamed   load a sample, load all to measure (rounds), load all again to merge
    encoded    the same, or nothing of it; load all to find scales, load all again to merge

The loader pulls loads from :meth:`Schedule.iter_loads`, which waits where the next load depends on
a result. Workers run the rest; work on chunks that are already in memory comes before new chunks.

Memory: statistics are reserved before the first chunk of their scope is loaded and given back when
its thresholds are known; a scope in flight never waits for a second reservation.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from streammerge.assignment.types import Action
from streammerge.checkpoint.snapshot import discard_snapshot
from streammerge.engine.buffers import Allowance, SlotPool
from streammerge.engine.device import DeviceStage
from streammerge.engine.encoding import TensorScales
from streammerge.engine.loading import Load, LoadedChunk
from streammerge.engine.merging import ChunkMerger, FindStatistics
from streammerge.engine.monitor import Monitor
from streammerge.engine.pieces import PieceInMemory
from streammerge.engine.progress import Progress
from streammerge.engine.queues import Outstanding, WorkQueue
from streammerge.engine.resuming import WHOLE_MODEL, Recovered
from streammerge.engine.scopes import ScopeStatistics
from streammerge.methods.programs import Programs
from streammerge.plan.budgeting import values_limit
from streammerge.plan.chunking import Chunk, Piece, Residence, Unit, iter_units
from streammerge.plan.sweeps import (
    Needs,
    collecting_limit,
    pack_sample,
    scope_bytes,
    spread_runs,
)
from streammerge.plan.types import MergePlan, TensorTask
from streammerge.statistics import BLOCK, count_blocks
from streammerge.statistics.magnitude import choose_sample_runs
from streammerge.statistics.rounds import NOTHING, Found

Work = Callable[[DeviceStage], None]
"""Something for a worker to do, on its own device stage."""


SNAPSHOT_SECONDS = 60.0
"""Between two snapshots of a sweep over the model. One may take a second, if the disk is slow."""
OnScope = Callable[[int, Found], None]
"""Told the index of a tensor, or :data:`~streammerge.engine.resuming.WHOLE_MODEL`, and the statistics
of that scope, one per source, on the thread that found them."""


@dataclass(frozen=True, slots=True)
class Shop:
    """What all parts of a running merge share."""

    plan: MergePlan
    """The plan."""
    needs: Needs
    """The statistics that tensors need."""
    monitor: Monitor
    """Ends waiting."""
    work: WorkQueue[Work]
    """What workers take from."""
    outstanding: Outstanding
    """Chunks begun and not written."""
    pool: SlotPool
    """Input buffers."""
    statistics: Allowance
    """Bytes for statistics."""
    merger: ChunkMerger
    """Merges a loaded chunk and sends it to the writers."""
    progress: Progress
    """Counters."""
    recovered: Recovered
    """What an interrupted run has done."""
    on_scope: OnScope
    """Told the statistics of a scope, by tensor, when they are known."""
    snapshot: Path | None
    """Where to save the state of a sweep over the model, now and then; None for nowhere."""
    keep_cached: bool
    """Whether all inputs fit the page cache, so that a second sweep finds them there."""


class Schedule:
    """Decides the order of loads; owns no thread."""

    def __init__(self, shop: Shop) -> None:
        """Prepare the schedule of a plan."""
        self._shop = shop

    def iter_loads(self) -> Iterator[Load]:
        """Yield every load in order; waits where one depends on earlier results."""
        shop = self._shop
        found = yield from self._sweep_model()
        for unit in iter_units(shop.plan, must_look=shop.needs.must_look):
            rest = [left for chunk in unit.chunks if (left := shop.recovered.rest_of(chunk))]
            known = found
            first = unit.chunks[0].pieces[0].task
            if unit.residence is not Residence.PASSING and known is None:
                # All its chunks are of one tensor.
                known = shop.recovered.found_of(first)
            if unit.residence is Residence.STREAMED and shop.plan.tasks[first].encoding:
                if rest or not shop.recovered.has_scales(shop.plan.tasks[first]):
                    yield from self._load_encoded(unit, rest, known)
                continue
            if not rest:
                continue
            if unit.residence is Residence.PASSING or known is not None:
                for chunk in rest:
                    yield self._merge_load(chunk, known)
            elif unit.residence is Residence.RESIDENT:
                yield from self._load_resident(unit)
            else:
                yield from self._load_streamed(unit, rest)

    def _merge_load(
        self,
        chunk: Chunk,
        found: Found | None,
        scales: TensorScales | None = None,
        merged: Callable[[], None] = lambda: None,
    ) -> Load:
        """Load a chunk that can be merged as soon as it is there; ``merged`` is called then."""
        self._shop.outstanding.begin()

        def work(stage: DeviceStage, loaded: LoadedChunk) -> None:
            self._shop.merger.merge(stage, loaded, self._finder(stage, found), scales)
            merged()

        def then(loaded: LoadedChunk) -> None:
            self._shop.work.put(lambda stage: work(stage, loaded))

        return Load(chunk, then, last_use=True, joined=True)

    def _finder(self, stage: DeviceStage, found: Found | None) -> FindStatistics:
        """Return what gives the statistics of a piece: those that are known, or what it finds itself."""

        def find(piece: PieceInMemory) -> Sequence[Found]:
            return self._found_of(stage, piece) if found is None else [found] * len(piece.parts)

        return find

    def _found_of(self, stage: DeviceStage, piece: PieceInMemory) -> Sequence[Found]:
        """Find the thresholds of small tensors that are all here."""
        task = piece.first.task
        need = self._shop.needs.of(task)
        if need is None:
            return [NOTHING] * len(piece.parts)
        if task.numel <= BLOCK:
            return stage.settle(piece)
        # Small enough for the room that a worker keeps for itself: nothing is reserved.
        limit = values_limit(task.numel)
        statistics = _tensor_statistics(self._shop.plan, need, task, limit)
        while statistics.found is None:
            _sample_pieces(stage, statistics, [piece])
            statistics.add(0, stage.measure(piece, statistics.asking))
            statistics.conclude()
        return [statistics.found]

    def _load_resident(self, unit: Unit) -> Iterator[Load]:
        shop = self._shop
        task = shop.plan.tasks[unit.chunks[0].pieces[0].task]
        need = shop.needs.of(task)
        assert need is not None  # noqa: S101 - or it would be passing
        reserved = shop.statistics.reserve(scope_bytes(shop.plan, need, task.numel))
        limit = collecting_limit(shop.plan, need, task.numel, reserved)
        statistics = _tensor_statistics(shop.plan, need, task, limit)
        tensor = ResidentTensor(shop, statistics, reserved, len(unit.chunks))
        for chunk in unit.chunks:
            shop.outstanding.begin()
            yield Load(chunk, tensor.arrived, last_use=True)

    def _load_streamed(self, unit: Unit, rest: Sequence[Chunk]) -> Iterator[Load]:
        found = yield from self._find_statistics(unit)
        for chunk in rest:
            yield self._merge_load(chunk, found)

    def _load_encoded(
        self, unit: Unit, rest: Sequence[Chunk], found: Found | None
    ) -> Iterator[Load]:
        """Load a tensor that becomes codes: for its thresholds, for its scales, and to be merged."""
        shop = self._shop
        task = shop.plan.tasks[unit.chunks[0].pieces[0].task]
        if found is None and shop.needs.must_look(task):
            found = yield from self._find_statistics(unit)
        assert task.encoding is not None  # noqa: S101 - or it would not be here
        reserved = shop.statistics.reserve(task.encoding.nbytes)
        scales = TensorScales(task)
        looking = Outstanding(shop.monitor)
        for chunk in unit.chunks:
            yield self._look_load(chunk, found, scales, looking)
        looking.wait()
        scales.conclude()
        users = Users(len(rest) + 1, last=lambda: shop.statistics.release(reserved))
        shop.outstanding.begin()

        def written() -> None:
            users.leave()
            shop.outstanding.end()

        shop.merger.write_scales(scales, written)
        for chunk in rest:
            yield self._merge_load(chunk, found, scales, users.leave)

    def _look_load(
        self,
        chunk: Chunk,
        found: Found | None,
        scales: TensorScales,
        looking: Outstanding,
    ) -> Load:
        """Load a chunk that is merged for the sake of its tensor's scales."""
        looking.begin()

        def work(stage: DeviceStage, loaded: LoadedChunk) -> None:
            self._shop.merger.look(stage, loaded, self._finder(stage, found), scales)
            looking.end()

        def then(loaded: LoadedChunk) -> None:
            self._shop.work.put(lambda stage: work(stage, loaded))

        return Load(chunk, then, last_use=False)

    def _find_statistics(self, unit: Unit) -> Generator[Load, None, Found]:
        """Find the thresholds of a tensor that is too large to be kept."""
        shop = self._shop
        task_index = unit.chunks[0].pieces[0].task
        task = shop.plan.tasks[task_index]
        need = shop.needs.of(task)
        assert need is not None  # noqa: S101 - or it would be passing
        reserved = shop.statistics.reserve(scope_bytes(shop.plan, need, task.numel))
        limit = collecting_limit(shop.plan, need, task.numel, reserved)
        statistics = _tensor_statistics(shop.plan, need, task, limit)
        yield from self._sweep(statistics, [task_index], unit.chunks, keep_cached=True)
        shop.statistics.release(reserved)
        assert statistics.found is not None  # noqa: S101 - the sweep ends when they are known
        shop.on_scope(task_index, statistics.found)
        return statistics.found

    def _sweep_model(self) -> Generator[Load, None, Found | None]:
        """Find one threshold per source over all merged tensors, if they share a scope."""
        shop = self._shop
        whole = shop.needs.of_model()
        if whole is None:
            return None
        known = shop.recovered.found_of(WHOLE_MODEL)
        if known is not None:
            return known
        need, merged = whole
        tasks = [shop.plan.tasks[index] for index in merged]
        numel = sum(task.numel for task in tasks)
        reserved = shop.statistics.reserve(scope_bytes(shop.plan, need, numel))
        statistics = ScopeStatistics(
            need,
            numel=numel,
            blocks=sum(count_blocks(task.numel) for task in tasks),
            compute_dtype=shop.plan.compute_dtype,
            limit=collecting_limit(shop.plan, need, numel, reserved),
        )
        chunks = [
            Chunk(pieces, chunk.models)
            for unit in iter_units(shop.plan, must_look=lambda _: False)
            for chunk in unit.chunks
            if (pieces := _merged_pieces(shop.plan, chunk))
        ]
        shop.progress.activity = "statistics"
        yield from self._sweep(
            statistics, merged, chunks, keep_cached=shop.keep_cached, snapshot=shop.snapshot
        )
        shop.progress.activity = "merge"
        shop.statistics.release(reserved)
        assert statistics.found is not None  # noqa: S101 - the sweep ends when they are known
        shop.on_scope(WHOLE_MODEL, statistics.found)
        if shop.snapshot is not None:
            discard_snapshot(shop.snapshot)
        return statistics.found

    def _sweep(
        self,
        statistics: ScopeStatistics,
        tasks: Sequence[int],
        chunks: Sequence[Chunk],
        *,
        keep_cached: bool,
        snapshot: Path | None = None,
    ) -> Iterator[Load]:
        """Load a sample where one helps, and everything once per question, until all is known."""
        measuring = Outstanding(self._shop.monitor)
        if snapshot is not None:
            statistics.restore(snapshot)
        due = time.monotonic() + SNAPSHOT_SECONDS
        while statistics.found is None:
            runs = spread_runs(self._shop.plan, tasks, statistics.sample_runs)
            if runs:
                statistics.prepare_sample(sum(piece.numel for piece in runs))
                for chunk in pack_sample(self._shop.plan, runs):
                    yield self._measure_load(chunk, statistics, measuring, sample=True)
                measuring.wait()
                statistics.conclude_sample()
            for chunk in chunks:
                rest = _unanswered(self._shop.plan, statistics, chunk)
                if rest is None:
                    continue
                load = self._measure_load(rest, statistics, measuring, sample=False)
                yield Load(load.chunk, load.then, last_use=not keep_cached)
                if snapshot is not None and time.monotonic() >= due:
                    statistics.save(snapshot)
                    due = time.monotonic() + SNAPSHOT_SECONDS
            measuring.wait()
            statistics.conclude()

    def _measure_load(
        self, chunk: Chunk, statistics: ScopeStatistics, measuring: Outstanding, *, sample: bool
    ) -> Load:
        measuring.begin()

        def work(stage: DeviceStage, loaded: LoadedChunk) -> None:
            for piece in loaded.pieces:
                if sample:
                    room = statistics.sample_room(piece.numel)
                    stage.sample(piece, piece.first.start, statistics.asking, room)
                else:
                    _measure(stage, statistics, piece)
            loaded.release()
            measuring.end()

        def then(loaded: LoadedChunk) -> None:
            self._shop.work.put(lambda stage: work(stage, loaded))

        return Load(chunk, then, last_use=False)


class ResidentTensor:
    """A tensor whose chunks wait in memory for its thresholds."""

    def __init__(self, shop: Shop, statistics: ScopeStatistics, reserved: int, chunks: int) -> None:
        """Expect ``chunks`` chunks; ``reserved`` bytes are given back with the thresholds."""
        self._shop = shop
        self._statistics = statistics
        self._reserved = reserved
        self._expected = chunks
        self._lock = threading.Lock()
        self._loaded: list[LoadedChunk] = []
        self._unanswered = 0

    def arrived(self, loaded: LoadedChunk) -> None:
        """Take a loaded chunk; the last one starts the statistics."""
        with self._lock:
            self._loaded.append(loaded)
            complete = len(self._loaded) == self._expected
        if complete:
            self._shop.work.put(self._start, urgent=True)

    def _start(self, stage: DeviceStage) -> None:
        found = self._statistics.found
        if found is None:
            pieces = [loaded.pieces[0] for loaded in self._loaded]
            _sample_pieces(stage, self._statistics, pieces)
            self._unanswered = len(self._loaded)
            for loaded in self._loaded:
                self._shop.work.put(_bind(self._measure, loaded), urgent=True)
            return
        self._shop.statistics.release(self._reserved)
        self._shop.on_scope(self._loaded[0].chunk.pieces[0].task, found)
        for loaded in self._loaded:
            self._shop.work.put(_bind(self._merge, loaded), urgent=True)
        self._loaded = []

    def _measure(self, stage: DeviceStage, loaded: LoadedChunk) -> None:
        _measure(stage, self._statistics, loaded.pieces[0])
        with self._lock:
            self._unanswered -= 1
            last = self._unanswered == 0
        if last:
            self._statistics.conclude()
            self._start(stage)

    def _merge(self, stage: DeviceStage, loaded: LoadedChunk) -> None:
        found = self._statistics.found
        assert found is not None  # noqa: S101 - merging starts when they are known
        if self._shop.recovered.has(loaded.chunk.pieces[0]):
            # It was read again only because the statistics of its tensor were lost.
            loaded.release()
            self._shop.outstanding.end()
            return
        self._shop.merger.merge(stage, loaded, lambda _: [found])


class Users:
    """Counts those who leave, and does something when the last one does; thread-safe."""

    def __init__(self, count: int, *, last: Callable[[], None]) -> None:
        """Expect ``count`` to leave."""
        self._left = count
        self._last = last
        self._lock = threading.Lock()

    def leave(self) -> None:
        """Leave."""
        with self._lock:
            self._left -= 1
            last = self._left == 0
        if last:
            self._last()


def _bind(work: Callable[[DeviceStage, LoadedChunk], None], loaded: LoadedChunk) -> Work:
    return lambda stage: work(stage, loaded)


def _measure(stage: DeviceStage, statistics: ScopeStatistics, piece: PieceInMemory) -> None:
    first_block = piece.first.task.scope_block + piece.first.start // BLOCK
    statistics.add(first_block, stage.measure(piece, statistics.asking))


def _sample_pieces(
    stage: DeviceStage, statistics: ScopeStatistics, pieces: Sequence[PieceInMemory]
) -> None:
    """Sample a tensor that is all in memory, its pieces in any order."""
    runs = choose_sample_runs(pieces[0].first.task.numel, statistics.sample_runs)
    if not runs:
        return
    statistics.prepare_sample(sum(count for _, count in runs))
    by_start = sorted(pieces, key=lambda piece: piece.first.start)
    for start, count in runs:
        piece = next(p for p in reversed(by_start) if p.first.start <= start)
        stage.sample(piece, start, statistics.asking, statistics.sample_room(count))
    statistics.conclude_sample()


def _unanswered(plan: MergePlan, statistics: ScopeStatistics, chunk: Chunk) -> Chunk | None:
    """Return what of a chunk has not been measured in this round; None when all has."""

    def measured(piece: Piece) -> bool:
        first = plan.tasks[piece.task].scope_block + piece.start // BLOCK
        return statistics.has_answers_of(first, count_blocks(piece.numel))

    pieces = tuple(piece for piece in chunk.pieces if not measured(piece))
    return Chunk(pieces, chunk.models) if pieces else None


def _tensor_statistics(
    plan: MergePlan, need: Programs, task: TensorTask, limit: int
) -> ScopeStatistics:
    """Start the statistics of one tensor."""
    return ScopeStatistics(
        need,
        numel=task.numel,
        blocks=count_blocks(task.numel),
        compute_dtype=plan.compute_dtype,
        limit=limit,
    )


def _merged_pieces(plan: MergePlan, chunk: Chunk) -> tuple[Piece, ...]:
    return tuple(piece for piece in chunk.pieces if plan.tasks[piece.task].action is Action.MERGE)
