"""What the engine asks of an accelerator: memory, streams, events, and what an error means.

Work is only ever *enqueued*: on a stream things happen one after the other, on different streams in
any order, unless one waits for an event that another one records. The host waits for events too, in
:meth:`Event.synchronize`, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from streammerge.errors import DeviceLostError

if TYPE_CHECKING:
    from torch import Tensor


class Failure(StrEnum):
    """What an error of a device comes to."""

    OUT_OF_MEMORY = "out of memory"
    """The device had no memory left for a request; it works on."""
    LOST = "lost"
    """The device, or the process's hold on it, is gone."""
    OTHER = "other"
    """It is not the device's."""


class Event(Protocol):
    """A point in the work of a stream."""

    def synchronize(self) -> None:
        """Let the calling thread wait until the work before the last record is done."""
        ...


class Stream(Protocol):
    """A queue of work on a device; used by one thread."""

    def run(self, work: Callable[[], None]) -> None:
        """Enqueue the torch operations that ``work`` calls.

        They must not wait for the device: no ``item``, no ``nonzero``, no copy from or to memory
        that is not page-locked.
        """
        ...

    def run_waiting(self, work: Callable[[], None]) -> None:
        """Do what was enqueued here, then the torch operations that ``work`` calls.

        They may wait for the device, as decompositions do, which look at what they have found. All
        that they make is made of what lies there: what is made of nothing would lie on the host.
        """
        ...

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Enqueue a copy of bytes between page-locked host memory and the device.

        Args:
            target: ``[nbytes]`` uint8.
            source: ``[nbytes]`` uint8.
        """
        ...

    def record(self, event: Any) -> None:
        """Let an event stand for all work enqueued so far."""
        ...

    def wait(self, event: Any) -> None:
        """Let later work here wait for what an event stands for now; nothing if it never did."""
        ...


class Backend(Protocol):
    """One device."""

    @property
    def name(self) -> str:
        """``"cuda:0"``."""
        ...

    @property
    def obstacle(self) -> str | None:
        """Why no fused kernel can be compiled, as half a sentence; None where they can."""
        ...

    @property
    def tile(self) -> int:
        """Elements that one instance of a fused kernel works on; a power of two."""
        ...

    def on_thread(self) -> AbstractContextManager[None]:
        """Make this the device of the calling thread."""
        ...

    def make_stream(self) -> Stream:
        """Make a stream of work."""
        ...

    def make_event(self) -> Event:
        """Make an event that stands for nothing yet."""
        ...

    def allocate(self, nbytes: int) -> Tensor:
        """Return ``[nbytes]`` uint8 on the device, uninitialised."""
        ...

    def pin(self, nbytes: int) -> NDArray[np.uint8]:
        """Return page-locked memory of the host.

        Raises:
            OutOfMemoryError: The system refuses.
        """
        ...

    def free_bytes(self) -> int:
        """Return the memory of the device that is free, in bytes."""
        ...

    def trim(self) -> None:
        """Give memory that is not in use back to the device."""
        ...

    def peak_bytes(self) -> int:
        """Return the most memory that this process had of the device since it was opened."""
        ...

    def classify(self, error: BaseException) -> Failure:
        """Say what an error that came out of a call here, or of torch, comes to."""
        ...


GO_ON = "continue with --resume"
"""How a merge goes on after an error of a device."""


def lost(name: str, error: BaseException, then: str = GO_ON) -> DeviceLostError:
    """Return the error about a device that has failed.

    Args:
        name: The device.
        error: What came of it.
        then: How the work goes on.
    """
    reason = str(error).split("\n", maxsplit=1)[0]
    return DeviceLostError(
        f"{name} failed: {reason}; {then}, on another device or with --device cpu"
    )
