"""A tensor that waits in memory, and how pieces in memory are sampled and measured.

Memory: the tensor's slots, and what is reserved for its statistics.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from itertools import groupby

from streammerge.engine.asking import BlockAnswer
from streammerge.engine.context import MergeContext, Work
from streammerge.engine.device import DeviceStage
from streammerge.engine.gathering import GatheredTensor
from streammerge.engine.loading import LoadedChunk
from streammerge.engine.pieces import PieceInMemory
from streammerge.engine.scopes import ScopeStatistics
from streammerge.statistics import BLOCK, count_blocks
from streammerge.statistics.magnitude import SAMPLE_RUN, SampleRun, choose_sample_runs


class ResidentTensor:
    """A tensor whose chunks wait in memory for its thresholds."""

    def __init__(
        self,
        context: MergeContext,
        statistics: ScopeStatistics | GatheredTensor,
        reserved: int,
        chunks: int,
        kept: int,
    ) -> None:
        """Expect ``chunks`` chunks.

        Args:
            context: Where work is done.
            statistics: Of the tensor.
            reserved: Bytes that are given back when all is known.
            chunks: Of the tensor.
            kept: Bytes of what was found that are given back when all is merged.
        """
        self._context = context
        self._users = Users(chunks, last=lambda: context.statistics.release(kept))
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
            self._context.work.put(self._start, urgent=True)

    def _start(self, stage: DeviceStage) -> None:
        found = self._statistics.found
        if found is None:
            pieces = [loaded.pieces[0] for loaded in self._loaded]
            if isinstance(self._statistics, ScopeStatistics):
                sample_pieces(stage, self._statistics, pieces)
            self._unanswered = len(self._loaded)
            for loaded in self._loaded:
                self._context.work.put(_bind(self._measure, loaded), urgent=True)
            return
        self._context.statistics.release(self._reserved)
        if found.made is None:
            self._context.on_scope(self._loaded[0].chunk.pieces[0].task, found)
        for loaded in self._loaded:
            self._context.work.put(_bind(self._merge, loaded), urgent=True)
        self._loaded = []

    def _measure(self, stage: DeviceStage, loaded: LoadedChunk) -> None:
        measure(stage, self._statistics, loaded.pieces[0])
        with self._lock:
            self._unanswered -= 1
            last = self._unanswered == 0
        if last:
            self._statistics.conclude()
            self._start(stage)

    def _merge(self, stage: DeviceStage, loaded: LoadedChunk) -> None:
        found = self._statistics.found
        assert found is not None  # noqa: S101 - merging starts when they are known
        if self._context.recovered.has(loaded.chunk.pieces[0]):
            # It was read again only because the statistics of its tensor were lost.
            loaded.release()
            self._users.leave()
            self._context.outstanding.end()
            return
        self._context.merger.merge(stage, loaded, lambda _: [found])
        self._users.leave()


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


def measure(
    stage: DeviceStage, statistics: ScopeStatistics | GatheredTensor, piece: PieceInMemory
) -> None:
    """Ask a piece what a scope asks now."""
    first_block = piece.first.task.scope_block + piece.first.start // BLOCK
    if isinstance(statistics, GatheredTensor):
        stage.gather(piece, statistics.room(piece.first.start, piece.numel))
        there = [BlockAnswer((), None)] * count_blocks(piece.numel)
        statistics.add(first_block, there)
        return
    for block, answer in enumerate(stage.measure(piece, statistics.asking), first_block):
        statistics.add(block, [answer])


def sample_pieces(
    stage: DeviceStage, statistics: ScopeStatistics, pieces: Sequence[PieceInMemory]
) -> None:
    """Sample a tensor that is all in memory, its pieces in any order."""
    numel = pieces[0].first.task.numel
    runs = choose_sample_runs(numel, statistics.sample_runs, run_numel=SAMPLE_RUN)
    if not runs:
        return
    statistics.prepare_sample(sum(count for _, count in runs), SAMPLE_RUN)
    by_start = sorted(pieces, key=lambda piece: piece.first.start)

    def piece_of(run: SampleRun) -> PieceInMemory:
        return next(piece for piece in reversed(by_start) if piece.first.start <= run[0])

    for piece, group in groupby(runs, key=piece_of):
        own = list(group)
        room = statistics.sample_room(sum(count for _, count in own))
        stage.sample(piece, own, statistics.asking, room)
    statistics.conclude_sample()
