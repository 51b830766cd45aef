"""DoRA's norms on devices: the tensor that is changed goes through once more, and sums come back.

    file ─▶ page-locked stage ─▶ device: rows changed, squared, added up ─▶ stage ─▶ roots on the host

Readers find norms while workers merge, so that each has a bench of its own where the plan has room for
one. Without a bench a reader computes them itself: who does it decides no bit of them, nor what is
said of numbers that are not finite, which are always the reader's.

Memory: :class:`~streammerge.plan.device_norms.NormsShape` for each bench.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from streammerge.adapters.onto_base.changes import Change
from streammerge.adapters.onto_base.norms import rounded_roots
from streammerge.engine.accelerator.backend import Backend, Failure, lost
from streammerge.engine.accelerator.copies import StagedCopies
from streammerge.engine.factors import NormWork
from streammerge.lazily import torch
from streammerge.methods.base import MergeMethod
from streammerge.plan.device_norms import STAGES, NormsShape, has_norms_for_device
from streammerge.plan.devices import norms_of_plan, runs_on_device
from streammerge.plan.sweeps import programs_of_plan
from streammerge.plan.types import MergePlan, TensorTask

if TYPE_CHECKING:
    from torch import Tensor


class NormBench:
    """A place on a device where norms are found; used by one thread at a time."""

    def __init__(self, backend: Backend, shape: NormsShape) -> None:
        """Stand for a device; nothing is taken of it before the first matrix.

        Args:
            backend: The device.
            shape: What the bench may take.
        """
        self.backend = backend
        self._shape = shape
        self._copies: StagedCopies | None = None
        self._memory: Tensor | None = None

    def square(self, work: NormWork) -> NDArray[np.float64]:
        """Return the sum of each row's or column's squares; the calling thread is on the device.

        Raises:
            OutOfMemoryError: The system refuses page-locked memory.
        """
        # Triton takes half a second to load, which merges on the CPU need not wait for.
        from streammerge.engine.accelerator.fused.norms import SquaredMatrix  # noqa: PLC0415

        copies, memory = self._open()
        matrix = SquaredMatrix(work, copies, memory, self._shape.rows_numel, self.backend.tile)
        for begin in range(0, matrix.rows, matrix.step):
            matrix.add(range(begin, min(begin + matrix.step, matrix.rows)))
        found = np.empty(matrix.totals.numel())
        copies.fetch(matrix.totals.view(torch.uint8), found.view(np.uint8))
        return found

    def _open(self) -> tuple[StagedCopies, Tensor]:
        if self._memory is None:
            self._memory = self.backend.allocate(self._shape.device_bytes)
        if self._copies is None:
            stage_bytes = self._shape.stage_bytes
            self._copies = StagedCopies(self.backend, stages=STAGES, nbytes=stage_bytes)
        return self._copies, self._memory

    def abandon(self) -> None:
        """Wait for what is in flight, then let go of all memory, whatever has happened."""
        if self._copies is not None:
            self._copies.abandon()
        self._copies = self._memory = None


class NormsOnDevices:
    """Finds norms at the benches of all devices; thread-safe."""

    def __init__(
        self, plan: MergePlan, method: MergeMethod, backends: Sequence[Backend], benches: int
    ) -> None:
        """Stand for devices; nothing is taken of them yet.

        Args:
            plan: The plan.
            method: Its method.
            backends: The devices.
            benches: Benches on each of them.
        """
        self._plan = plan
        self._programs = programs_of_plan(plan, method)
        shape = norms_of_plan(plan, method, fused=True)
        # Devices in turn.
        self._idle = [NormBench(each, shape) for _ in range(benches) for each in backends]
        self._lock = threading.Lock()

    def find(self, task: TensorTask, change: Change, work: NormWork) -> Tensor | None:
        """Return the norms of each row or column, ``[n]`` float32; None where a reader has to find them.

        Args:
            task: The tensor.
            change: A change of it.
            work: What norms are found of.

        Raises:
            DeviceLostError: The device has failed.
            OutOfMemoryError: The system refuses page-locked memory.
        """
        bench = self._take() if self._goes_there(task, change) else None
        if bench is None:
            return None
        totals = self._square(bench, work)
        if totals is None:
            # Outside of what has failed, with which all that it held is gone.
            bench.backend.trim()
            return None
        with self._lock:
            self._idle.append(bench)
        norms = rounded_roots(totals, torch.float32)
        # What is no number has no bits to agree on, and a reader says where it is.
        return norms if bool(torch.isfinite(norms).all()) else None

    def _goes_there(self, task: TensorTask, change: Change) -> bool:
        settings = self._plan.settings
        itemsize = self._plan.compute_dtype.itemsize
        return has_norms_for_device(change) and runs_on_device(
            task, self._programs, settings, fused=True, compute_itemsize=itemsize
        )

    def _take(self) -> NormBench | None:
        with self._lock:
            return self._idle.pop() if self._idle else None

    def _square(self, bench: NormBench, work: NormWork) -> NDArray[np.float64] | None:
        """Return sums of squares; None if the device's memory has run out, and the bench is no more."""
        backend = bench.backend
        try:
            with backend.on_thread():
                return bench.square(work)
        except Exception as error:
            failure = backend.classify(error)
            bench.abandon()
            if failure is Failure.LOST:
                raise lost(backend.name, error) from error
            if failure is Failure.OTHER:
                raise
            return None
