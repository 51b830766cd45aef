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

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from streammerge.assignment.types import Action
from streammerge.checkpoint.snapshot import discard_snapshot
from streammerge.engine.context import MergeContext, SweepShare
from streammerge.engine.device import DeviceStage
from streammerge.engine.encoding import TensorScales
from streammerge.engine.gathering import GatheredTensor
from streammerge.engine.loading import Load, LoadedChunk
from streammerge.engine.merging import FindStatistics
from streammerge.engine.pieces import PieceInMemory
from streammerge.engine.queues import Outstanding
from streammerge.engine.resident import ResidentTensor, Users, measure, sample_pieces
from streammerge.engine.resuming import WHOLE_MODEL
from streammerge.engine.rows import memory_of
from streammerge.engine.scopes import ScopeStatistics
from streammerge.errors import ResumeError
from streammerge.methods.programs import Programs
from streammerge.plan.budgeting import private_limit, scattered_bytes
from streammerge.plan.chunking import Chunk, Piece, Residence, Unit, iter_units
from streammerge.plan.demanding import rows_to_remember
from streammerge.plan.device_matrices import gathering_bytes
from streammerge.plan.sweeps import (
    Needs,
    collecting_limit,
    pack_sample,
    sample_run_numel,
    scope_bytes,
    spread_runs,
)
from streammerge.plan.types import MergePlan, TensorTask
from streammerge.statistics import BLOCK, count_blocks
from streammerge.statistics.rounds import NOTHING, Found, RowMemory

SNAPSHOT_SECONDS = 60.0
"""Between two snapshots of a sweep over the model. One may take a second, if the disk is slow."""


class Schedule:
    """Decides the order of loads; owns no thread."""

    def __init__(self, context: MergeContext) -> None:
        """Prepare the schedule of a plan."""
        self._context = context

    def iter_loads(self) -> Iterator[Load]:
        """Yield every load in order; waits where one depends on earlier results."""
        context = self._context
        found = yield from self._sweep_model()
        for unit in iter_units(context.plan, must_look=context.needs.must_look):
            rest = [left for chunk in unit.chunks if (left := context.recovered.rest_of(chunk))]
            known = found
            first = unit.chunks[0].pieces[0].task
            if unit.residence is not Residence.PASSING and known is None:
                # All its chunks are of one tensor.
                known = context.recovered.found_of(first)
            if unit.residence is Residence.STREAMED and context.plan.tasks[first].encoding:
                if rest or not context.recovered.has_scales(context.plan.tasks[first]):
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
        self._context.outstanding.begin()

        def work(stage: DeviceStage, loaded: LoadedChunk) -> None:
            self._context.merger.merge(stage, loaded, self._finder(stage, found), scales)
            merged()

        def then(loaded: LoadedChunk) -> None:
            self._context.work.put(lambda stage: work(stage, loaded))

        return Load(chunk, then, last_use=True, joined=True)

    def _finder(self, stage: DeviceStage, found: Found | None) -> FindStatistics:
        """Return what gives the statistics of a piece: those that are known, or what it finds itself."""

        def find(piece: PieceInMemory) -> Sequence[Found]:
            return self._found_of(stage, piece) if found is None else [found] * len(piece.parts)

        return find

    def _found_of(self, stage: DeviceStage, piece: PieceInMemory) -> Sequence[Found]:
        """Find the thresholds of small tensors that are all here."""
        task = piece.first.task
        need = self._context.needs.of(task)
        if need is None:
            return [NOTHING] * len(piece.parts)
        if task.numel <= BLOCK:
            return stage.settle(piece)
        # Small enough for the room that a worker keeps for itself: nothing is reserved.
        limit, rows = private_limit(need.counts, task.numel), memory_of(need, task)
        statistics = _tensor_statistics(self._context, need, task, limit=limit, rows=rows)
        assert isinstance(statistics, ScopeStatistics)  # noqa: S101 - others have units of their own
        while statistics.found is None:
            sample_pieces(stage, statistics, [piece])
            measure(stage, statistics, piece)
            statistics.conclude()
        return [statistics.found]

    def _load_resident(self, unit: Unit) -> Iterator[Load]:
        context = self._context
        task = context.plan.tasks[unit.chunks[0].pieces[0].task]
        begun = self._begin(task)
        tensor = ResidentTensor(
            context, begun.statistics, begun.reserved, len(unit.chunks), kept=begun.kept
        )
        for chunk in unit.chunks:
            context.outstanding.begin()
            yield Load(chunk, tensor.arrived, last_use=True)

    def _load_streamed(self, unit: Unit, rest: Sequence[Chunk]) -> Iterator[Load]:
        found, kept = yield from self._find_statistics(unit)
        users = Users(len(rest), last=lambda: self._context.statistics.release(kept))
        for chunk in rest:
            yield self._merge_load(chunk, found, merged=users.leave)

    def _load_encoded(
        self, unit: Unit, rest: Sequence[Chunk], found: Found | None
    ) -> Iterator[Load]:
        """Load a tensor that becomes codes: for its thresholds, for its scales, and to be merged."""
        context = self._context
        task = context.plan.tasks[unit.chunks[0].pieces[0].task]
        kept = 0
        if found is None and context.needs.must_look(task):
            found, kept = yield from self._find_statistics(unit)
        assert task.encoding is not None  # noqa: S101 - or it would not be here
        reserved = context.statistics.reserve(task.encoding.nbytes)
        scales = TensorScales(task)
        looking = Outstanding(context.monitor)
        for chunk in unit.chunks:
            yield self._look_load(chunk, found, scales, looking)
        looking.wait()
        scales.conclude()
        users = Users(len(rest) + 1, last=lambda: context.statistics.release(reserved + kept))
        context.outstanding.begin()

        def written() -> None:
            users.leave()
            context.outstanding.end()

        context.merger.write_scales(scales, written)
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
            self._context.merger.look(stage, loaded, self._finder(stage, found), scales)
            looking.end()

        def then(loaded: LoadedChunk) -> None:
            self._context.work.put(lambda stage: work(stage, loaded))

        return Load(chunk, then, last_use=False)

    def _find_statistics(self, unit: Unit) -> Generator[Load, None, tuple[Found, int]]:
        """Find the thresholds of a tensor that is too large to be kept.

        Returns:
            What was found, and the bytes of it that are reserved until all is merged.
        """
        context = self._context
        task_index = unit.chunks[0].pieces[0].task
        begun = self._begin(context.plan.tasks[task_index])
        yield from self._sweep(begun.statistics, [task_index], unit.chunks, keep_cached=True)
        found = begun.statistics.found
        assert found is not None  # noqa: S101 - the sweep ends when they are known
        context.statistics.release(begun.reserved)
        if found.made is None:
            context.on_scope(task_index, found)
        return found, begun.kept

    def _begin(self, task: TensorTask) -> _Begun:
        """Reserve what the statistics of a tensor take, and start them."""
        plan, need = self._context.plan, self._context.needs.of(task)
        assert need is not None  # noqa: S101 - or it would be passing
        if need.work.whole is None:
            searching = scope_bytes(plan, need, task.numel)
        else:
            itemsize, has_devices = plan.compute_dtype.itemsize, plan.device is not None
            searching = gathering_bytes(task, need, itemsize, has_devices=has_devices)
        kept = RowMemory.nbytes_of(rows_to_remember(need, task), need.row_numbers)
        if searching + kept > plan.resources.statistics_bytes:
            # What is found about rows is found once more, then.
            kept = 0
        reserved = self._context.statistics.reserve(searching + kept)
        rows = memory_of(need, task) if kept else None
        if need.work.whole is not None:
            kept = task.numel * plan.compute_dtype.itemsize
        limit = collecting_limit(plan, need, task.numel, searching)
        statistics = _tensor_statistics(self._context, need, task, limit=limit, rows=rows)
        return _Begun(statistics, reserved - kept, kept)

    def _sweep_model(self) -> Generator[Load, None, Found | None]:
        """Find one threshold per source over all merged tensors, if they share a scope."""
        context = self._context
        whole = context.needs.of_model()
        if whole is None:
            return None
        known = context.recovered.found_of(WHOLE_MODEL)
        if known is not None:
            return known
        _, merged = whole
        statistics, nbytes = open_model_statistics(context.plan, context.needs)
        reserved = context.statistics.reserve(nbytes)
        chunks = [
            Chunk(pieces, chunk.models)
            for unit in iter_units(context.plan, must_look=lambda _: False)
            for chunk in unit.chunks
            if (pieces := _merged_pieces(context.plan, chunk))
        ]
        context.progress.activity = "statistics"
        if context.sweep is not None:
            yield from self._sweep_share(statistics, merged, chunks, context.sweep)
            return None
        yield from self._sweep(
            statistics, merged, chunks, keep_cached=context.keep_cached, snapshot=context.snapshot
        )
        context.progress.activity = "merge"
        context.statistics.release(reserved)
        assert statistics.found is not None  # noqa: S101 - the sweep ends when they are known
        context.on_scope(WHOLE_MODEL, statistics.found)
        if context.snapshot is not None:
            discard_snapshot(context.snapshot)
        return statistics.found

    def _sweep(
        self,
        statistics: ScopeStatistics | GatheredTensor,
        tasks: Sequence[int],
        chunks: Sequence[Chunk],
        *,
        keep_cached: bool,
        snapshot: Path | None = None,
    ) -> Iterator[Load]:
        """Load a sample where one helps, and everything once per question, until all is known."""
        measuring = Outstanding(self._context.monitor)
        scope = statistics if isinstance(statistics, ScopeStatistics) else None
        if scope is not None and snapshot is not None:
            scope.restore(snapshot)
        due = time.monotonic() + SNAPSHOT_SECONDS
        while statistics.found is None:
            if scope is not None:
                yield from self._sample(scope, tasks, measuring)
            for chunk in chunks:
                rest = _unanswered(self._context.plan, statistics, chunk)
                if rest is None:
                    continue
                load = self._measure_load(rest, statistics, measuring)
                yield Load(load.chunk, load.then, last_use=not keep_cached)
                if scope is not None and snapshot is not None and time.monotonic() >= due:
                    scope.save(snapshot)
                    due = time.monotonic() + SNAPSHOT_SECONDS
            measuring.wait()
            statistics.conclude()

    def _sample(
        self, scope: ScopeStatistics, tasks: Sequence[int], measuring: Outstanding
    ) -> Iterator[Load]:
        """Load a sample for the first questions of a round, where one helps."""
        runs = spread_runs(self._context.plan, tasks, scope.sample_runs)
        if not runs:
            return
        plan = self._context.plan
        scope.prepare_sample(sum(piece.numel for piece in runs), sample_run_numel(plan))
        for chunk in pack_sample(plan, runs):
            yield self._sample_load(chunk, scope, measuring)
        measuring.wait()
        scope.conclude_sample()

    def _sweep_share(
        self,
        statistics: ScopeStatistics,
        tasks: Sequence[int],
        chunks: Sequence[Chunk],
        share: SweepShare,
    ) -> Iterator[Load]:
        """Load what one process measures of a sweep that several do, or the sample before it."""
        if not statistics.restore(share.question, sampled=not share.samples):
            raise ResumeError(
                f"{share.question}: the questions of this sweep are gone; merge again"
            )
        measuring = Outstanding(self._context.monitor)
        if share.samples:
            yield from self._sample(statistics, tasks, measuring)
        else:
            for chunk in chunks:
                pieces = tuple(piece for piece in chunk.pieces if piece.task in share.tasks)
                if pieces:
                    yield self._measure_load(Chunk(pieces, chunk.models), statistics, measuring)
            measuring.wait()
        statistics.save(share.answers)

    def _sample_load(
        self, chunk: Chunk, statistics: ScopeStatistics, measuring: Outstanding
    ) -> Load:
        def work(stage: DeviceStage, loaded: LoadedChunk) -> None:
            for piece in loaded.pieces:
                room = statistics.sample_room(piece.numel)
                stage.sample(piece, [(piece.first.start, piece.numel)], statistics.asking, room)
            loaded.release()
            measuring.end()

        return self._load_for(chunk, work, measuring)

    def _measure_load(
        self, chunk: Chunk, statistics: ScopeStatistics | GatheredTensor, measuring: Outstanding
    ) -> Load:
        def work(stage: DeviceStage, loaded: LoadedChunk) -> None:
            for piece in loaded.pieces:
                measure(stage, statistics, piece)
            loaded.release()
            measuring.end()

        return self._load_for(chunk, work, measuring)

    def _load_for(
        self,
        chunk: Chunk,
        work: Callable[[DeviceStage, LoadedChunk], None],
        measuring: Outstanding,
    ) -> Load:
        measuring.begin()

        def then(loaded: LoadedChunk) -> None:
            self._context.work.put(lambda stage: work(stage, loaded))

        return Load(chunk, then, last_use=False)


def open_model_statistics(plan: MergePlan, needs: Needs) -> tuple[ScopeStatistics, int]:
    """Return the statistics of a scope that is the whole model, at their first question.

    Args:
        plan: A merge that has such a scope.
        needs: What its tensors need.

    Returns:
        The statistics, and the bytes that they take.
    """
    whole = needs.of_model()
    assert whole is not None  # noqa: S101 - the caller looked
    need, merged = whole
    tasks = [plan.tasks[index] for index in merged]
    numel = sum(task.numel for task in tasks)
    blocks = sum(count_blocks(task.numel) for task in tasks)
    scattered = scattered_bytes(need.counts, numel, blocks)
    searching = min(scope_bytes(plan, need, numel), plan.resources.statistics_bytes - scattered)
    statistics = ScopeStatistics(
        need,
        numel=numel,
        blocks=blocks,
        compute_dtype=plan.compute_dtype,
        limit=collecting_limit(plan, need, numel, searching),
    )
    return statistics, searching + scattered


def _unanswered(
    plan: MergePlan, statistics: ScopeStatistics | GatheredTensor, chunk: Chunk
) -> Chunk | None:
    """Return what of a chunk has not been measured in this round; None when all has."""

    def measured(piece: Piece) -> bool:
        first = plan.tasks[piece.task].scope_block + piece.start // BLOCK
        return statistics.has_answers_of(first, count_blocks(piece.numel))

    pieces = tuple(piece for piece in chunk.pieces if not measured(piece))
    return Chunk(pieces, chunk.models) if pieces else None


@dataclass(frozen=True, slots=True)
class _Begun:
    """The statistics of one tensor, and what is reserved for them."""

    statistics: ScopeStatistics | GatheredTensor
    """Which they are."""
    reserved: int
    """Bytes until all is known."""
    kept: int
    """Bytes until all is merged: what was made of a whole tensor, and what is known of rows."""


def _tensor_statistics(
    context: MergeContext, need: Programs, task: TensorTask, *, limit: int, rows: RowMemory | None
) -> ScopeStatistics | GatheredTensor:
    """Start the statistics of one tensor."""
    if need.work.whole is not None:
        return GatheredTensor(
            need.work,
            task,
            sources=need.sources,
            compute_dtype=context.plan.compute_dtype,
            make=context.make_whole,
        )
    return ScopeStatistics(
        need,
        numel=task.numel,
        blocks=count_blocks(task.numel),
        compute_dtype=context.plan.compute_dtype,
        limit=limit,
        rows=rows,
    )


def _merged_pieces(plan: MergePlan, chunk: Chunk) -> tuple[Piece, ...]:
    return tuple(piece for piece in chunk.pieces if plan.tasks[piece.task].action is Action.MERGE)
