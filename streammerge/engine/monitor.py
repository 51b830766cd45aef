"""What the threads of a merge share: one lock, the first error, and a way to wait that can end."""

from __future__ import annotations

import threading
from collections.abc import Callable


class StoppedError(Exception):
    """Another thread failed or the user interrupted; this one has nothing left to do."""


class Monitor:
    """One lock with several conditions; a failure wakes every waiting thread.

    The first error wins. Later ones are attached to it as notes, so nothing is lost.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._conditions: list[threading.Condition] = []
        self._failure: BaseException | None = None

    @property
    def failure(self) -> BaseException | None:
        """The first error; None while all is well."""
        return self._failure

    def condition(self) -> threading.Condition:
        """Return a new condition on the shared lock."""
        condition = threading.Condition(self.lock)
        self._conditions.append(condition)
        return condition

    def wait(
        self,
        condition: threading.Condition,
        until: Callable[[], bool],
        seconds: float | None = None,
    ) -> bool:
        """Wait until the predicate holds; the lock is held before and after.

        Args:
            condition: Notified when the predicate may have changed.
            until: The predicate.
            seconds: Give up after about so long; None never does.

        Returns:
            Whether the predicate holds.

        Raises:
            StoppedError: The work failed or was stopped meanwhile.
        """
        timed_out = False
        while True:
            if self._failure is not None:
                raise StoppedError
            if until():
                return True
            if timed_out:
                return False
            timed_out = not condition.wait(seconds)

    def fail(self, error: BaseException) -> None:
        """Record an error and wake all threads."""
        with self.lock:
            if self._failure is None:
                self._failure = error
            elif error is not self._failure:
                self._failure.add_note(f"then: {type(error).__name__}: {error}")
            for condition in self._conditions:
                condition.notify_all()
