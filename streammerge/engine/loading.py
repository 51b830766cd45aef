"""The loader: takes the next chunk in order, waits for buffers, fills them from the input files.

Several threads load at once. They take chunks one after the other and wait for buffers in that
order, so the oldest work always gets its memory first and nothing can lock up; reading itself
runs side by side.

Memory: slots, one per input of every chunk in flight, and what the cache of factors holds.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from streammerge.checkpoint.bytesource import ByteSource
from streammerge.engine.buffers import Slot, SlotPool
from streammerge.engine.decoding import read_span
from streammerge.engine.factors import FactorCache, HeldFactors
from streammerge.engine.monitor import Monitor
from streammerge.engine.pacing import Pace
from streammerge.engine.pieces import view_pieces
from streammerge.engine.progress import Progress, Stage
from streammerge.plan.chunking import Chunk, ModelRead, plan_reads
from streammerge.plan.types import MergePlan


class LoadedChunk:
    """A chunk in memory; its slots go back when the last holder lets go."""

    def __init__(
        self,
        plan: MergePlan,
        chunk: Chunk,
        reads: Sequence[ModelRead],
        slots: list[Slot],
        *,
        pool: SlotPool,
        factors: HeldFactors,
        joined: bool,
    ) -> None:
        """View the slots as tensors, small neighbours ``joined`` or each by itself."""
        self.chunk = chunk
        self._factors = factors
        self._slots = slots
        self._pool = pool
        self._holders = 1
        self._lock = threading.Lock()
        memories = [slot.memory for slot in slots]
        self.pieces = view_pieces(plan, chunk, reads, memories, factors.deltas_of, joined=joined)

    def hold(self) -> None:
        """Keep the slots for one more holder."""
        with self._lock:
            self._holders += 1

    def release(self) -> None:
        """Let go; the last holder gives the slots back."""
        with self._lock:
            self._holders -= 1
            last = self._holders == 0
        if last:
            self._pool.release(self._slots)
            self._factors.release()


@dataclass(frozen=True, slots=True)
class Load:
    """One chunk to be loaded, and what to do with it then."""

    chunk: Chunk
    """What to read."""
    then: Callable[[LoadedChunk], None]
    """Hands the loaded chunk on; must not take long."""
    last_use: bool
    """Whether the bytes will not be read again, so that the system may forget them."""
    joined: bool = False
    """Whether small neighbours are wanted as one piece."""


class Loader:
    """Reads chunks in the order of a schedule."""

    def __init__(
        self,
        plan: MergePlan,
        sources: Sequence[ByteSource],
        pool: SlotPool,
        factors: FactorCache,
        loads: Iterator[Load],
        *,
        monitor: Monitor,
        progress: Progress,
        pace: Pace | None = None,
    ) -> None:
        """Prepare to load.

        Args:
            plan: The plan.
            sources: Open input files, by their index in the plan.
            pool: Input buffers.
            factors: Tensors of adapters.
            loads: What to load; taken from under a lock, so it may wait for earlier work.
            monitor: Ends waiting.
            progress: Counts bytes and seconds.
            pace: Keeps to that of other merges; None without any.
        """
        self._plan = plan
        self._sources = sources
        self._pool = pool
        self._factors = factors
        self._loads = loads
        self._monitor = monitor
        self._progress = progress
        self._pace = pace
        self._turn = threading.Lock()

    def run(self) -> None:
        """Load until the schedule ends; the body of every reader thread."""
        while True:
            with self._progress.spending(Stage.READER_IDLE), self._turn:
                load = next(self._loads, None)
                if self._pace is not None:
                    self._keep_pace(self._pace, load)
                if load is None:
                    return
                factors = self._factors.take(piece.task for piece in load.chunk.pieces)
                slots = self._pool.acquire(len(load.chunk.models))
            with self._progress.spending(Stage.READ):
                factors.fill()
                reads = plan_reads(self._plan, load.chunk)
                for read, slot in zip(reads, slots, strict=True):
                    self._read(read, slot.memory, last_use=load.last_use)
            loaded = LoadedChunk(
                self._plan,
                load.chunk,
                reads,
                slots,
                pool=self._pool,
                factors=factors,
                joined=load.joined,
            )
            load.then(loaded)

    def _keep_pace(self, pace: Pace, load: Load | None) -> None:
        if load is None:
            pace.leave()
        else:
            pace.reach(load.chunk, lambda: self._monitor.failure is not None)

    def _read(self, read: ModelRead, memory: NDArray[np.uint8], *, last_use: bool) -> None:
        for span in read.spans:
            if self._monitor.failure is not None:
                return
            read_span(span, self._sources, memory)
            if last_use and not span.is_scattered:
                self._sources[span.file].drop(span.offset, span.nbytes)
            self._progress.count(Stage.READ, span.nbytes)
