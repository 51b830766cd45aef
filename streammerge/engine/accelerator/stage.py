"""The stage of a worker with an accelerator: sends each piece where it belongs, and survives faults.

Tensors of more than a block go to the device (:func:`~streammerge.plan.devices.runs_on_device`). The
rest is the CPU stage's, as are samples of a few thousand elements, and whatever looks wrong on the
device: the CPU's stage then names the tensor and the element as it always does.

Memory: that of a ring, and of a CPU stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from numpy.typing import NDArray

from streammerge.engine.accelerator.backend import Backend, Failure, lost
from streammerge.engine.accelerator.computing import DeviceComputing, Suspicion
from streammerge.engine.accelerator.keeping import KeptPieces
from streammerge.engine.accelerator.ring import Ring
from streammerge.engine.asking import Asking, BlockAnswer
from streammerge.engine.compiled.opening import open_cpu_stage
from streammerge.engine.device import Applied
from streammerge.engine.pieces import PieceInMemory, Stored, torch_dtype
from streammerge.errors import MemoryBudgetError, NonFiniteError, printable
from streammerge.methods.base import MergeMethod
from streammerge.plan.devices import plan_step, runs_on_device
from streammerge.plan.sweeps import programs_of_plan
from streammerge.plan.types import DeviceResources, MergePlan
from streammerge.statistics import BLOCK
from streammerge.statistics.magnitude import SampleRun
from streammerge.statistics.rounds import Found
from streammerge.statistics.surveying import Surveyed
from streammerge.units import format_size

Result = TypeVar("Result")

_SMALLER = 4
"""A step that did not fit is cut into so many: with half of it, others' use of the device that grows
further would end the merge."""


class AcceleratorStage:
    """Merges and measures on a device; see :class:`streammerge.engine.device.DeviceStage`."""

    def __init__(
        self,
        plan: MergePlan,
        method: MergeMethod,
        resources: DeviceResources,
        backend: Backend,
        kept: KeptPieces,
    ) -> None:
        """Prepare a worker; the device's memory is taken with the first piece that goes there.

        Args:
            plan: The plan.
            method: Its method.
            resources: What the plan takes of devices.
            backend: The worker's.
            kept: The pieces that it keeps, for all of its workers.
        """
        self._kept = kept
        self._plan = plan
        self._programs = programs_of_plan(plan, method)
        self._method = method
        self._backend = backend
        self._host = open_cpu_stage(plan, method)
        self._step_numel = resources.step_numel
        self._fused = resources.fused
        self._retried = False
        self._ring: Ring | None = None
        self._computing: DeviceComputing | None = None

    def apply(self, piece: PieceInMemory, found: Sequence[Found], out: Stored) -> list[Applied]:
        """Merge a piece."""
        if not self._takes(piece):
            return self._host.apply(piece, found, out)
        try:
            return [self._attempt(lambda computing: computing.merge(piece, found[0], out))]
        except Suspicion:
            self._host.apply(piece, found, out)
            raise _unnamed(piece) from None

    def survey(self, piece: PieceInMemory, found: Sequence[Found], out: Stored) -> list[Surveyed]:
        """Return what a report knows of a piece; both are in the host's memory."""
        return self._host.survey(piece, found, out)

    def convert(self, piece: PieceInMemory, out: Stored) -> Applied:
        """Convert a piece."""
        return self._host.convert(piece, out)

    def measure(self, piece: PieceInMemory, asking: Asking) -> Iterable[BlockAnswer]:
        """Answer questions about a piece; the answers are good until the next call."""
        if not self._takes(piece):
            return self._host.measure(piece, asking)
        try:
            return self._attempt(lambda computing: computing.measure(piece, asking))
        except Suspicion:
            list(self._host.measure(piece, asking))
            raise _unnamed(piece) from None

    def gather(self, piece: PieceInMemory, out: NDArray[Any]) -> None:
        """Fill in vectors."""
        self._host.gather(piece, out)

    def settle(self, piece: PieceInMemory) -> list[Found]:
        """Find all that is asked about small tensors."""
        return self._host.settle(piece)

    def sample(
        self, piece: PieceInMemory, runs: Sequence[SampleRun], asking: Asking, out: NDArray[Any]
    ) -> None:
        """Fill in values to be ranked."""
        self._host.sample(piece, runs, asking, out)

    def close(self) -> None:
        """Wait for what is in flight and let go of the device's memory."""
        if self._ring is not None:
            self._ring.abandon()
        self._ring = self._computing = None

    def _takes(self, piece: PieceInMemory) -> bool:
        return runs_on_device(
            piece.first.task,
            self._programs,
            self._plan.settings,
            fused=self._fused,
            compute_itemsize=self._plan.compute_dtype.itemsize,
        )

    def _attempt(self, work: Callable[[DeviceComputing], Result]) -> Result:
        """Run work on the device; once, if its memory runs out, again in smaller steps."""
        try:
            return work(self._open())
        except Suspicion:
            raise
        except Exception as error:
            failure = self._backend.classify(error)
            self.close()
            if failure is Failure.LOST:
                raise lost(self._backend.name, error) from error
            if failure is Failure.OTHER:
                raise
            if self._retried:
                raise self._too_little() from error
        # Here the error is gone, and with it what its frames had allocated.
        self._retried = True
        self._kept.shrink()
        self._backend.trim()
        self._step_numel = max(BLOCK, self._step_numel // _SMALLER // BLOCK * BLOCK)
        return self._attempt(work)

    def _open(self) -> DeviceComputing:
        if self._computing is None:
            shape = plan_step(self._plan, self._method, self._step_numel, fused=self._fused)
            assert shape is not None  # noqa: S101 - there is a piece for the device
            dtype = torch_dtype(self._plan.compute_dtype)
            # What each trim or source keeps, and values that are not finite.
            counts = 1 + max(
                max(len(each.merge.trims), len(each.merge.streams)) for each in self._programs
            )
            self._ring = Ring(self._backend, shape, dtype, counts=counts)
            tile = self._backend.tile if self._fused else 0
            self._computing = DeviceComputing(
                self._plan, self._method, self._ring, self._kept, tile
            )
        return self._computing

    def _too_little(self) -> MemoryBudgetError:
        shape = plan_step(self._plan, self._method, self._step_numel, fused=self._fused)
        needed = (
            "" if shape is None else f", of which a worker needs {format_size(shape.device_bytes)}"
        )
        return MemoryBudgetError(
            f"{self._backend.name} ran out of memory twice, at last with steps of "
            f"{self._step_numel:,} elements{needed}; {format_size(self._backend.free_bytes())} are "
            "free; end what else uses it, or give fewer --workers or --device cpu, then continue with "
            "--resume"
        )


def _unnamed(piece: PieceInMemory) -> NonFiniteError:
    """Return the error about a value that the CPU's stage finds nothing wrong with.

    Only the last bit of a sum of many rows can make that difference.
    """
    return NonFiniteError(
        f"{printable(piece.first.task.name)}: a merged value is at the very edge of what its type "
        "can hold; choose a wider output.dtype or smaller weights"
    )
