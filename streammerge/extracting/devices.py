"""What an extraction takes of accelerators: which matrices go there, and how much memory they need."""

from __future__ import annotations

from collections.abc import Sequence

from streammerge.adapters.combining.plans import DeviceShare
from streammerge.extracting.factoring import OVERSAMPLE, comparing_bytes, reading_bytes
from streammerge.extracting.plans import FactorTask
from streammerge.plan.device_matrices import (
    HOST_BYTES,
    allow_matrix,
    decomposing_bytes,
    goes_to_device,
)
from streammerge.plan.devices import HOST_GROWTH_BYTES
from streammerge.plan.planning import Machine

_SPACES = 8
"""Spaces on both sides, as :func:`~streammerge.extracting.factoring.workspace` counts them."""


def is_for_device(task: FactorTask) -> bool:
    """Return whether a matrix is factored on an accelerator, if there is one."""
    return goes_to_device(task.pair.shape)


def share_devices(tasks: Sequence[FactorTask], machine: Machine) -> DeviceShare | None:
    """Return what an extraction takes of the machine's devices; None if it has none.

    Raises:
        MemoryBudgetError: A matrix does not fit them; names the least memory that would do.
    """
    if not machine.devices:
        return None
    there = [task for task in tasks if is_for_device(task)]
    largest = max(there, key=device_bytes, default=None)
    peak = 0 if largest is None else device_bytes(largest)
    name = "" if largest is None else f"{largest.pair.name} {list(largest.pair.shape)}"
    allowed = allow_matrix(
        name, peak, machine.devices, budget=machine.device_budget, free=machine.device_free
    )
    return DeviceShare(machine.devices, matrices=len(there), peak=peak, budget=allowed)


def host_growth_bytes(machine: Machine) -> int:
    """Return what the use of the devices takes of the process beside the matrices."""
    return len(machine.devices) * (HOST_GROWTH_BYTES + HOST_BYTES)


def host_bytes(task: FactorTask) -> int:
    """Return the host memory of a matrix that a device factors: the difference, its factors, the reading."""
    rows, columns = task.pair.shape
    # Whichever side is multiplied with the projection.
    drawn = 0 if task.exact else max(rows, columns) * _width(task)
    return 4 * (rows * columns + drawn) + task.down.nbytes + task.up.nbytes + reading_bytes()


def device_bytes(task: FactorTask) -> int:
    """Return the memory of a device for a matrix: the matrix, what becomes of it, and the comparison."""
    rows, columns = task.pair.shape
    longest = max(rows, columns)
    kept = 4 * rows * columns + task.down.nbytes + task.up.nbytes + comparing_bytes(longest)
    if task.exact:
        return kept + decomposing_bytes(rows * columns, 4)
    width = _width(task)
    spaces = 4 * width * (_SPACES * (rows + columns) + longest)
    return kept + spaces + decomposing_bytes(width * longest, 4)


def _width(task: FactorTask) -> int:
    """Return the columns of the projection."""
    return min(task.rank + OVERSAMPLE, *task.pair.shape)
