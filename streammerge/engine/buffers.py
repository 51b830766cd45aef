"""Reusable buffers of one size, and the count of what they may cost.

Memory: a pool holds at most ``count * nbytes`` bytes; a slot costs nothing until its first use.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from streammerge.engine.monitor import Monitor
from streammerge.errors import PlanError
from streammerge.units import KIB

_OWN_MAPPING = 256 * KIB
"""Smaller memory is not worth a system call, and page faults, each time."""


@dataclass(frozen=True, slots=True, eq=False)
class Slot:
    """One buffer."""

    memory: NDArray[np.uint8]
    """The bytes."""


class SlotPool:
    """A fixed number of buffers that threads take and give back."""

    def __init__(
        self,
        monitor: Monitor,
        *,
        count: int,
        nbytes: int,
        make: Callable[[int], NDArray[np.uint8]] | None = None,
    ) -> None:
        """Prepare a pool.

        Args:
            monitor: Ends waiting when the work fails.
            count: Number of buffers.
            nbytes: Size of each.
            make: Gives memory of a size; None for :func:`allocate`.
        """
        self._monitor = monitor
        self._nbytes = nbytes
        self._memory_of = make or allocate
        self._count = count
        self._unmade = count
        self._idle: list[Slot] = []
        self._returned = monitor.condition()

    def acquire(self, count: int) -> list[Slot]:
        """Wait for ``count`` buffers and take them all at once.

        Callers that need several must ask in one call: two threads that each hold some of what
        the other needs would wait forever.

        Raises:
            PlanError: There are not so many; a plan that was edited would wait for ever.
            StoppedError: The work was stopped meanwhile.
        """
        if count > self._count:
            raise PlanError(
                f"the plan has {self._count} buffers of {self._nbytes} bytes, and a chunk needs "
                f"{count} at once; plan again"
            )
        with self._monitor.lock:
            self._monitor.wait(self._returned, lambda: len(self._idle) + self._unmade >= count)
            # Recently used buffers first: their pages exist and may still be in a cache.
            taken = [self._idle.pop() for _ in range(min(count, len(self._idle)))]
            self._unmade -= count - len(taken)
        return taken + [self._make() for _ in range(count - len(taken))]

    def release(self, slots: list[Slot]) -> None:
        """Give buffers back."""
        with self._monitor.lock:
            self._idle.extend(slots)
            self._returned.notify_all()

    def _make(self) -> Slot:
        return Slot(self._memory_of(self._nbytes))


def allocate(nbytes: int) -> NDArray[np.uint8]:
    """Return memory that costs nothing until it is used, and leaves the process when it is freed.

    Large blocks are mappings of their own. From the heap they would be cut out of what is free
    there, and stay with the process, in one arena per thread, after they are freed.
    """
    if nbytes < _OWN_MAPPING or os.name != "posix":
        return np.empty(nbytes, dtype=np.uint8)
    mapping = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # Fewer page faults and address translations; all of it is accounted for anyway. A kernel
        # without huge pages refuses, and nothing is lost.
        with contextlib.suppress(OSError):
            mapping.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(mapping, dtype=np.uint8)


class Allowance:
    """Bytes that may be in use at once for what is not kept in slots."""

    def __init__(self, monitor: Monitor, nbytes: int) -> None:
        """Allow ``nbytes`` in all."""
        self._monitor = monitor
        self._free = nbytes
        self._total = nbytes
        self._returned = monitor.condition()

    @property
    def total(self) -> int:
        """All that there is, in bytes."""
        return self._total

    def reserve(self, nbytes: int) -> int:
        """Wait until ``nbytes`` are free, take and return them; at most the total is asked for.

        Raises:
            StoppedError: The work was stopped meanwhile.
        """
        nbytes = min(nbytes, self._total)
        with self._monitor.lock:
            self._monitor.wait(self._returned, lambda: self._free >= nbytes)
            self._free -= nbytes
        return nbytes

    def release(self, nbytes: int) -> None:
        """Give bytes back."""
        with self._monitor.lock:
            self._free += nbytes
            self._returned.notify_all()
