"""The accelerators of one merge, shared by its workers.

All workers take chunks from one queue, so several devices share the work by chunk, each as fast as
it is. Which device computes a chunk decides no bit of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from streammerge.engine.accelerator import opening
from streammerge.engine.accelerator.backend import Backend
from streammerge.engine.accelerator.keeping import KeptPieces
from streammerge.engine.accelerator.matrices import WholeOnDevices
from streammerge.engine.accelerator.norms import NormsOnDevices
from streammerge.engine.accelerator.proving import prove
from streammerge.engine.accelerator.stage import AcceleratorStage
from streammerge.engine.factors import FindNorms
from streammerge.engine.gathering import MakeWhole, make_on_cpu
from streammerge.engine.monitor import Monitor
from streammerge.errors import DeviceError
from streammerge.methods.base import MergeMethod
from streammerge.plan.devices import plan_step
from streammerge.plan.types import MergePlan


class Accelerators:
    """The open devices of a plan; none, where it is for the CPU."""

    def __init__(self, plan: MergePlan, method: MergeMethod) -> None:
        """Open the devices.

        Raises:
            DeviceError: One is not there, or does not do what the plan says as the CPU does.
            DeviceLostError: One does not answer.
        """
        self._plan = plan
        self._method = method
        names = () if plan.device is None else plan.device.names
        self._backends = opening.open_devices(names)
        self._check_kernels()
        for backend in self._backends:
            with backend.on_thread():
                prove(plan, method, backend)
        self._kept = [self._keep_on(backend) for backend in self._backends]

    def _check_kernels(self) -> None:
        """Refuse a plan that counts on kernels which cannot be compiled here."""
        device = self._plan.device
        for backend in self._backends:
            if device is not None and device.fused and backend.obstacle is not None:
                raise DeviceError(
                    f"{backend.name}: the plan counts on fused kernels there, and {backend.obstacle}; "
                    "plan again on this machine, or use --device cpu"
                )

    def _keep_on(self, backend: Backend) -> KeptPieces:
        device = self._plan.device
        assert device is not None  # noqa: S101 - it names the backend
        shape = plan_step(self._plan, self._method, device.step_numel, fused=device.fused)
        nbytes = 0 if shape is None else shape.piece_bytes
        return KeptPieces(backend, device.kept_pieces, nbytes)

    @property
    def pin(self) -> Callable[[int], NDArray[np.uint8]] | None:
        """Gives page-locked memory, which all devices can copy from; None without devices."""
        return self._backends[0].pin if self._backends else None

    def whole_maker(self, monitor: Monitor) -> MakeWhole:
        """Return what makes of whole tensors what the method does.

        Args:
            monitor: Ends waiting for a device.
        """
        return WholeOnDevices(self._backends, monitor).make if self._backends else make_on_cpu

    def norms_finder(self) -> FindNorms | None:
        """Return what finds DoRA's norms on the devices; None where the plan has no room for it."""
        device = self._plan.device
        if device is None or not device.norm_benches:
            return None
        return NormsOnDevices(self._plan, self._method, self._backends, device.norm_benches).find

    @contextmanager
    def stage_of(self, worker: int) -> Iterator[AcceleratorStage]:
        """Give a worker the stage on its device; the calling thread is the worker's."""
        assert self._plan.device is not None  # noqa: S101 - the caller looked
        index = worker % len(self._backends)
        backend, kept = self._backends[index], self._kept[index]
        with backend.on_thread():
            stage = AcceleratorStage(self._plan, self._method, self._plan.device, backend, kept)
            try:
                yield stage
            finally:
                stage.close()

    def peak_bytes(self) -> int:
        """Return the most memory that the process had of any one device."""
        return max((backend.peak_bytes() for backend in self._backends), default=0)
