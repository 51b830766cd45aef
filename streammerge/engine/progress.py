"""How far the work is and where the time goes: counters that all threads add to, read as events."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum


class Stage(StrEnum):
    """What a thread's time is spent on."""

    READ = "read"
    """Waiting for input bytes."""
    COMPUTE = "compute"
    """Measuring and merging."""
    WRITE = "write"
    """Waiting for output bytes to be taken."""
    READER_IDLE = "readers idle"
    """Readers waiting for a free buffer or for statistics."""
    WORKER_IDLE = "workers idle"
    """Workers waiting for something to compute, or for a free output buffer."""
    WRITER_IDLE = "writers idle"
    """Writers waiting for something to write."""


@dataclass(frozen=True, slots=True)
class ProgressEvent:
    """Where a merge stands."""

    activity: str
    """What is being done: ``"statistics"`` or ``"merge"``."""
    bytes_done: int
    """Bytes read and written so far."""
    bytes_total: int
    """Bytes that will be read and written."""
    seconds: float
    """Since the work began."""
    rate: float
    """Bytes per second, over all of the work so far."""
    seconds_left: float
    """At that rate."""

    @classmethod
    def at(cls, activity: str, done: int, total: int, seconds: float) -> ProgressEvent:
        """Return the event of an activity that has done so many bytes in so many seconds.

        Args:
            activity: What is being done.
            done: Bytes so far.
            total: Bytes in all, as far as known: never fewer than are done.
            seconds: Since it began.
        """
        rate = done / seconds if seconds > 0 else 0.0
        total = max(total, done)
        left = (total - done) / rate if rate > 0 else float("inf")
        return cls(activity, done, total, seconds, rate, left)


OnProgress = Callable[[ProgressEvent], None]
"""Receives events a few times per second, on the thread that called ``merge``."""


class Progress:
    """Counts bytes and seconds; every method may be called from any thread."""

    def __init__(self, bytes_total: int) -> None:
        """Start the clock."""
        self._lock = threading.Lock()
        self._began = time.perf_counter()
        self._total = bytes_total
        self._bytes: Counter[Stage] = Counter()
        self._seconds = dict.fromkeys(Stage, 0.0)
        self.activity = "merge"

    @contextmanager
    def spending(self, stage: Stage) -> Iterator[None]:
        """Count the time inside as this stage's."""
        began = time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - began
            with self._lock:
                self._seconds[stage] += elapsed

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside as idle, and take it off the computing that it interrupts."""
        began = time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - began
            with self._lock:
                self._seconds[Stage.WORKER_IDLE] += elapsed
                self._seconds[Stage.COMPUTE] -= elapsed

    def count(self, stage: Stage, nbytes: int) -> None:
        """Count bytes read or written."""
        with self._lock:
            self._bytes[stage] += nbytes

    def event(self) -> ProgressEvent:
        """Return where the work stands."""
        with self._lock:
            done = self._bytes[Stage.READ] + self._bytes[Stage.WRITE]
        seconds = time.perf_counter() - self._began
        return ProgressEvent.at(self.activity, done, self._total, seconds)

    def bytes_by_stage(self) -> dict[str, int]:
        """Return the bytes read and written."""
        with self._lock:
            return {stage.value: self._bytes[stage] for stage in (Stage.READ, Stage.WRITE)}

    def seconds_by_stage(self) -> dict[str, float]:
        """Return thread-seconds per stage, summed over the stage's threads."""
        with self._lock:
            return {stage.value: round(self._seconds[stage], 3) for stage in Stage}
