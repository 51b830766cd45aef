"""Hand-over points between the stages, and the count of what is still to be done.

Memory: a queue holds references; what they refer to lies in slots, whose number is bounded.
"""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

from streammerge.engine.monitor import Monitor

Item = TypeVar("Item")


class WorkQueue(Generic[Item]):
    """A queue that gives urgent items out first."""

    def __init__(self, monitor: Monitor) -> None:
        """Create an empty queue."""
        self._monitor = monitor
        self._urgent: deque[Item] = deque()
        self._normal: deque[Item] = deque()
        self._closed = False
        self._changed = monitor.condition()

    def put(self, item: Item, *, urgent: bool = False) -> None:
        """Add an item."""
        with self._monitor.lock:
            (self._urgent if urgent else self._normal).append(item)
            self._changed.notify()

    def close(self) -> None:
        """Let takers end once the queue is empty."""
        with self._monitor.lock:
            self._closed = True
            self._changed.notify_all()

    def take(self) -> Item | None:
        """Wait for an item; None when the queue is closed and empty.

        Raises:
            StoppedError: The work was stopped meanwhile.
        """
        with self._monitor.lock:
            self._monitor.wait(
                self._changed, lambda: bool(self._urgent or self._normal or self._closed)
            )
            if self._urgent:
                return self._urgent.popleft()
            return self._normal.popleft() if self._normal else None


class Outstanding:
    """How many pieces of work were begun and not ended; waits for there to be none."""

    def __init__(self, monitor: Monitor) -> None:
        """Start at zero."""
        self._monitor = monitor
        self._count = 0
        self._ended = monitor.condition()

    def begin(self, count: int = 1) -> None:
        """Announce work."""
        with self._monitor.lock:
            self._count += count

    def end(self) -> None:
        """Report one piece done."""
        with self._monitor.lock:
            self._count -= 1
            if self._count == 0:
                self._ended.notify_all()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until nothing is outstanding, at most ``seconds``; return whether that is so.

        Raises:
            StoppedError: The work was stopped meanwhile.
        """
        with self._monitor.lock:
            return self._monitor.wait(self._ended, lambda: self._count == 0, seconds)
