"""Work on whole matrices on accelerators: brought there, worked on, and brought back, one at a time.

A decomposition takes far longer than the copies (:mod:`~streammerge.engine.accelerator.copies`), so that
nothing is gained by copying meanwhile: all of it is one stream of work.

Memory: on the device what :mod:`streammerge.plan.device_matrices` states, for as long as one matrix takes;
page-locked ``STAGES * STAGE_BYTES`` per device.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from streammerge.engine.accelerator.backend import GO_ON, Backend, Failure, lost
from streammerge.engine.accelerator.copies import Bytes, StagedCopies
from streammerge.engine.buffers import allocate
from streammerge.engine.gathering import make_on_cpu
from streammerge.engine.monitor import Monitor
from streammerge.errors import MemoryBudgetError, printable
from streammerge.lazily import torch
from streammerge.methods.base import Work
from streammerge.plan.device_matrices import (
    STAGE_BYTES,
    STAGES,
    decomposed_on_device,
    matrix_bytes,
)
from streammerge.plan.types import TensorTask
from streammerge.statistics.rounds import Found
from streammerge.units import format_size

if TYPE_CHECKING:
    from torch import Tensor

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class MatrixWork(Generic[Result]):
    """What is done with one matrix."""

    name: str
    """Of the matrix, for messages."""
    nbytes: int
    """What it takes of the device, as the plan states it."""
    given: Sequence[Bytes]
    """What is brought there, in host memory of any kind."""
    made: Sequence[Bytes]
    """What receives results."""
    compute: Callable[[Sequence[Tensor], Sequence[Tensor]], Result]
    """Works on what was brought and fills what is taken back, both ``[nbytes]`` uint8 on the device; may
    wait for it. Its return value is nothing that lies there."""


class MatrixBench:
    """One device's place for a matrix; used by one thread at a time."""

    def __init__(self, backend: Backend, opening: threading.Lock, then: str) -> None:
        """Stand for a device; nothing is taken of it before the first matrix.

        Args:
            backend: The device.
            opening: Held while this or another bench gets ready.
            then: How the work goes on after an error, for messages.
        """
        self._then = then
        self.backend = backend
        self._opening = opening
        self._copies: StagedCopies | None = None

    def run(self, work: MatrixWork[Result]) -> Result:
        """Do what is to be done with one matrix; once more, if the device's memory runs out.

        Raises:
            DeviceLostError: The device has failed.
            MemoryBudgetError: Its memory has run out twice.
            OutOfMemoryError: The system refuses page-locked memory.
        """
        for again in (False, True):
            try:
                result = self._run_once(work)
            except Exception as error:
                failure = self.backend.classify(error)
                if self._copies is not None:
                    self._copies.abandon()
                if failure is Failure.LOST:
                    raise lost(self.backend.name, error, self._then) from error
                if failure is Failure.OTHER:
                    raise
                if again:
                    raise self._too_little(work) from error
            else:
                # What was taken for one shape is of little use for the next, and would lie beside it.
                self.backend.trim()
                return result
            # Here the error is gone, and with it what its frames had allocated.
            self.backend.trim()
        raise AssertionError(work.name)

    def _run_once(self, work: MatrixWork[Result]) -> Result:
        copies = self._open()
        there = [self.backend.allocate(each.nbytes) for each in work.given]
        back = [self.backend.allocate(each.nbytes) for each in work.made]
        for source, target in zip(work.given, there, strict=True):
            copies.bring(source, target)
        results: list[Result] = []
        copies.stream.run_waiting(lambda: results.append(work.compute(there, back)))
        for device, host in zip(back, work.made, strict=True):
            copies.fetch(device, host)
        return results[0]

    def _open(self) -> StagedCopies:
        """Return the stream, which is made with the first matrix, as are the stages."""
        if self._copies is not None:
            return self._copies
        copies = StagedCopies(self.backend, stages=STAGES, nbytes=STAGE_BYTES)
        tiny = self.backend.allocate(32).view(torch.float64).view(2, 2)
        # The first decomposition loads a library, which two threads must not do at the same time:
        # https://github.com/pytorch/pytorch/issues/90613
        with self._opening:
            copies.stream.run_waiting(lambda: _decompose_zeros(tiny))
        self._copies = copies
        return copies

    def _too_little(self, work: MatrixWork[Any]) -> MemoryBudgetError:
        return MemoryBudgetError(
            f"{self.backend.name} ran out of memory twice with {printable(work.name)}, which takes "
            f"{format_size(work.nbytes)} to decompose; {format_size(self.backend.free_bytes())} are free; end "
            f"what else uses it, or give --device cpu, then {self._then}"
        )


def _decompose_zeros(matrix: Tensor) -> None:
    torch.linalg.svd(matrix.zero_())


class MatrixBenches:
    """The benches of all devices, for whoever comes first; thread-safe."""

    def __init__(self, backends: Sequence[Backend], monitor: Monitor, then: str) -> None:
        """Make one bench per device.

        Args:
            backends: The devices, at least one.
            monitor: Ends waiting when the work fails.
            then: How the work goes on after an error, for messages.
        """
        opening = threading.Lock()
        self._idle = [MatrixBench(backend, opening, then) for backend in backends]
        self._monitor = monitor
        self._returned = monitor.condition()

    def run(self, work: MatrixWork[Result]) -> Result:
        """Do what is to be done with a matrix on the first device that is idle.

        Raises:
            StoppedError: The work was stopped meanwhile.
            DeviceLostError: The device has failed.
            MemoryBudgetError: Its memory has run out twice.
        """
        with self._taken() as bench:
            return bench.run(work)

    @contextmanager
    def _taken(self) -> Iterator[MatrixBench]:
        with self._monitor.lock:
            self._monitor.wait(self._returned, lambda: bool(self._idle))
            bench = self._idle.pop()
        try:
            with bench.backend.on_thread():
                yield bench
        finally:
            with self._monitor.lock:
                self._idle.append(bench)
                self._returned.notify()


class WholeOnDevices:
    """Makes of whole tensors what methods do, on devices where those are for it; thread-safe."""

    def __init__(self, backends: Sequence[Backend], monitor: Monitor) -> None:
        """Share devices; see :class:`MatrixBenches`."""
        self._benches = MatrixBenches(backends, monitor, GO_ON)

    def make(self, work: Work, vectors: NDArray[Any], task: TensorTask) -> Found:
        """Return what a method makes of a tensor; see :func:`streammerge.engine.gathering.make_whole`.

        Raises:
            StoppedError: The work was stopped meanwhile.
            DeviceLostError: The device has failed.
            MemoryBudgetError: Its memory has run out twice.
        """
        if not decomposed_on_device(task, work):
            return make_on_cpu(work, vectors, task)
        assert work.whole is not None  # noqa: S101 - or nothing is gathered
        whole = work.whole
        dtype = torch.from_numpy(vectors).dtype

        def compute(given: Sequence[Tensor], made: Sequence[Tensor]) -> None:
            rows = given[0].view(dtype).view(len(vectors), *task.shape)
            made[0].view(dtype).copy_(whole(rows.unbind()).reshape(-1))

        room = allocate(task.numel * vectors.itemsize)
        self._benches.run(
            MatrixWork(
                name=task.name,
                nbytes=matrix_bytes(len(vectors), task.numel, vectors.itemsize),
                given=[vectors.reshape(-1).view(np.uint8)],
                made=[room],
                compute=compute,
            )
        )
        return Found(made=room.view(vectors.dtype))
