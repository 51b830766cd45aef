"""Merges over the same files, side by side: none runs so far ahead that files are read twice.

What one of them reads stays in the page cache for the others, for as long as nothing crowds it out. So
each says where it is before it loads a chunk, and waits while it is more than a window ahead of the
slowest. The slowest never waits, so nothing can lock up.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from itertools import accumulate

from streammerge.engine.monitor import StoppedError
from streammerge.plan.chunking import Chunk
from streammerge.plan.types import MergePlan

_WINDOW_CHUNKS = 4
"""How far a merge may be ahead of the slowest, in chunks of the largest size."""
_LOOK_SECONDS = 0.2
"""How soon one that waits finds out that its merge was stopped."""


class Pacer:
    """Knows where each of several merges is."""

    def __init__(self, plans: Sequence[MergePlan]) -> None:
        """Let none be many chunks ahead of the slowest: with less memory there is less cache, too."""
        self._window = _WINDOW_CHUNKS * max(plan.resources.slot_bytes for plan in plans)
        self._moved = threading.Condition()
        self._places: dict[Pace, int] = {}

    def join(self, plan: MergePlan) -> Pace:
        """Return what a merge is paced with from now on; it begins at the beginning."""
        pace = Pace(self, plan)
        with self._moved:
            self._places[pace] = 0
        return pace

    def reach(self, pace: Pace, place: int, stopped: Callable[[], bool]) -> None:
        """Say that a merge is at a place, and wait until the slowest is near enough."""
        with self._moved:
            if pace not in self._places:
                return
            self._places[pace] = place
            self._moved.notify_all()
            while place > min(self._places.values()) + self._window:
                if stopped():
                    raise StoppedError
                self._moved.wait(_LOOK_SECONDS)

    def leave(self, pace: Pace) -> None:
        """Wait for a merge no more."""
        with self._moved:
            self._places.pop(pace, None)
            self._moved.notify_all()


class Pace:
    """One merge's way of saying where it is."""

    def __init__(self, pacer: Pacer, plan: MergePlan) -> None:
        self._pacer = pacer
        self._itemsizes = [task.dtype.itemsize for task in plan.tasks]
        sizes = (task.numel * task.dtype.itemsize for task in plan.tasks)
        self._begins = list(accumulate(sizes, initial=0))

    def reach(self, chunk: Chunk, stopped: Callable[[], bool]) -> None:
        """Wait until this chunk may be loaded.

        Args:
            chunk: What is loaded next. A sweep that begins again takes the merge back.
            stopped: Asked now and then; ends the waiting.

        Raises:
            StoppedError: The merge was stopped meanwhile.
        """
        first = chunk.pieces[0]
        place = self._begins[first.task] + first.start * self._itemsizes[first.task]
        self._pacer.reach(self, place, stopped)

    def leave(self) -> None:
        """Say that nothing more is loaded."""
        self._pacer.leave(self)
