"""CUDA devices, by torch's documented interface.

What is relied on: work on a stream runs in order; ``copy_(non_blocking=True)`` between a device and
page-locked memory of one type and layout is one asynchronous copy on the current stream; memory
that is allocated while a stream is current is reused on that stream alone, without waiting. So
buffers that several streams use are allocated once, and freed only after the host has waited for
all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from streammerge.engine.accelerator.backend import Failure, lost
from streammerge.engine.accelerator.fused.opening import why_not_fused
from streammerge.errors import OutOfMemoryError
from streammerge.lazily import torch
from streammerge.units import format_size

if TYPE_CHECKING:
    from torch import Tensor

_TILE = 2048
"""Elements per instance of a fused kernel."""
_LOST = ("CUDA error", "CUDA driver error", "device-side assert", "cusolver error")
"""What torch's messages about a device that has failed have, in a RuntimeError or a kind of it."""
_FULL = ("out of memory", "STATUS_ALLOC_FAILED")
"""What they have where a library under torch asked the driver itself for memory: cuBLAS and cuSOLVER do
for their handles, and torch calls that an error of CUDA, too."""


class CudaEvent:
    """A point in the work of a stream."""

    def __init__(self, device: torch.device) -> None:
        """Make an event; a thread that waits for it sleeps instead of spinning."""
        with torch.cuda.device(device):
            self.event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]

    def synchronize(self) -> None:
        """Wait; see :class:`~streammerge.engine.accelerator.backend.Event`."""
        self.event.synchronize()


class CudaStream:
    """A stream of work."""

    def __init__(self, device: torch.device) -> None:
        """Take a stream of torch's pool."""
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def run(self, work: Callable[[], None]) -> None:
        """Enqueue operations."""
        with torch.cuda.stream(self._stream):
            work()

    def run_waiting(self, work: Callable[[], None]) -> None:
        """Do operations that may wait; torch lets them wait for this stream alone."""
        with torch.cuda.stream(self._stream):
            work()

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Enqueue a copy."""
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def record(self, event: CudaEvent) -> None:
        """Record an event."""
        self._stream.record_event(event.event)

    def wait(self, event: CudaEvent) -> None:
        """Wait for an event, on the device."""
        self._stream.wait_event(event.event)


class CudaBackend:
    """One CUDA device."""

    def __init__(self, index: int) -> None:
        """Open a device: the driver takes its own memory now, so that a plan can count it."""
        self._device = torch.device("cuda", index)
        with torch.cuda.device(self._device):
            torch.zeros(1, device=self._device).add_(1)
            torch.cuda.synchronize(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)

    @property
    def name(self) -> str:
        """``"cuda:0"``."""
        return str(self._device)

    @property
    def obstacle(self) -> str | None:
        """Why no fused kernel can be compiled."""
        return why_not_fused(self._device)

    @property
    def tile(self) -> int:
        """Elements per instance of a kernel: 16 for each thread, those of a counter of Philox."""
        return _TILE

    def on_thread(self) -> AbstractContextManager[None]:
        """Make this the device of the calling thread."""
        return self._current()

    @contextmanager
    def _current(self) -> Iterator[None]:
        with torch.cuda.device(self._device):
            yield

    def make_stream(self) -> CudaStream:
        """Make a stream."""
        return CudaStream(self._device)

    def make_event(self) -> CudaEvent:
        """Make an event."""
        return CudaEvent(self._device)

    def allocate(self, nbytes: int) -> Tensor:
        """Return device memory.

        It may have been freed while another stream still worked on it, so that all work is waited
        for first; this happens once per worker.
        """
        torch.cuda.synchronize(self._device)
        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def pin(self, nbytes: int) -> NDArray[np.uint8]:
        """Return page-locked memory; torch rounds it up to a power of two, which slots are."""
        try:
            memory = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:
            if self.classify(error) is Failure.LOST:
                raise lost(self.name, error) from error
            raise OutOfMemoryError(
                f"the system refused {format_size(nbytes)} of page-locked memory for {self.name} "
                f"({_first_line(error)}); give a smaller --memory or --device cpu, then continue "
                "with --resume"
            ) from error
        found: NDArray[np.uint8] = memory.numpy()
        return found

    def free_bytes(self) -> int:
        """Return the free memory, what torch holds for later requests included."""
        free, _ = torch.cuda.mem_get_info(self._device)
        held = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        return int(free + held)

    def trim(self) -> None:
        """Give memory back."""
        torch.cuda.empty_cache()

    def peak_bytes(self) -> int:
        """Return the most memory that torch's allocator had."""
        return int(torch.cuda.max_memory_reserved(self._device))

    def classify(self, error: BaseException) -> Failure:
        """Say what an error comes to."""
        if isinstance(error, torch.cuda.OutOfMemoryError):
            return Failure.OUT_OF_MEMORY
        if not isinstance(error, RuntimeError):
            return Failure.OTHER
        if any(each in str(error) for each in _FULL):
            return Failure.OUT_OF_MEMORY
        return Failure.LOST if any(each in str(error) for each in _LOST) else Failure.OTHER


@contextmanager
def full_products() -> Iterator[None]:
    """Let products of float32 matrices have float32's precision on devices, whatever the program asked for.

    Torch has one setting for the whole process, so this is for a whole job and not for one product.
    """
    products = torch.backends.cuda.matmul
    # The second is what torch had before 2.9; whoever mixes both gets an error from torch.
    name, full = (
        ("fp32_precision", "ieee") if hasattr(products, "fp32_precision") else ("allow_tf32", False)
    )
    before = getattr(products, name)
    setattr(products, name, full)
    try:
        yield
    finally:
        setattr(products, name, before)


def _first_line(error: BaseException) -> str:
    return str(error).split("\n", maxsplit=1)[0]
