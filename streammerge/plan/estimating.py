"""How long a merge would take on the CPU and on a device, by rates that somebody has measured.

Stages go on side by side, so that a merge takes as long as the longest of them:

    reading     bytes to read / rate of the inputs
    writing     bytes to write / rate of writing
    computing   (values · seconds per value + terms · seconds per term) / cores
    bus         bytes that cross / rate of page-locked copies
    there       bytes of device memory moved / its rate of copying, values sorted / its rate of sorting,
                and a moment per operation

How many of each there are is counted by :mod:`~streammerge.plan.loads`.

On a device computing is the longer of what is done there and what is left to the CPU, and the start comes before
everything. An estimate decides speed and nothing else, so where a device has other last bits than the CPU, or
what a merge does is not in the sum, :func:`why_not` says so, and nothing is estimated.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

from streammerge.assignment.types import Action
from streammerge.methods.base import MergeMethod
from streammerge.methods.programs import Programs
from streammerge.plan.choice import Seconds
from streammerge.plan.device_matrices import shape_matrices
from streammerge.plan.device_products import has_products_for_device
from streammerge.plan.devices import is_fused, plan_step, runs_on_device
from streammerge.plan.loads import (
    CoreLoad,
    DeviceLoad,
    load_cores,
    load_cores_beside,
    load_device,
)
from streammerge.plan.sweeps import programs_of_plan
from streammerge.plan.types import MergePlan, TensorTask

MARGIN = 0.2
"""By how much of the CPU's time a device must win: rates of a moment are off by about as much."""
START_SECONDS = 3.0
"""To import torch, for the driver to make a context, and for libraries to load their kernels. An estimate, of
which torch is 1.3."""
COMPILING_SECONDS = 1.0
"""For Triton to compile one kernel that it has not compiled before. An estimate."""
PRODUCT_SECONDS = 0.5
"""More, for each product of adapters' factors in it: without a device, eight took some seconds. An estimate."""
_ENQUEUING_SECONDS = 1e-5
"""To ask a device for one operation from Python. An estimate, twice what torch takes."""


@dataclass(frozen=True, slots=True)
class Rates:
    """How fast this machine reads, writes and computes."""

    read: float
    """Bytes per second that come from the inputs."""
    write: float
    """Bytes per second that the output takes."""
    value_seconds: float
    """Seconds of one core per value of an input, for all that is asked of it and its merge."""
    cores: int
    """Cores that this process may use."""
    changed_seconds: float = 0.0
    """Likewise of tensors that adapters change, beside their products; 0 where a plan has none."""
    term_seconds: float = 0.0
    """Seconds of one core per term of a product of adapters' factors; 0 where a plan has none."""


@dataclass(frozen=True, slots=True)
class DeviceRates:
    """How fast a device is."""

    bus: float
    """Bytes per second that are copied to it from page-locked memory."""
    memory: float
    """Bytes per second that are copied within its memory, each counted as read and written."""
    locking: float
    """Bytes per second of host memory that are page-locked."""
    sorting: float
    """Values per second that are ranked there within rows."""


def why_not(plan: MergePlan, method: MergeMethod) -> str | None:
    """Return why no estimate may send a merge to a device; None where one may.

    Args:
        plan: The plan for the CPU.
        method: Its method.
    """
    if plan.asks_stores:
        return "how fast the store of the inputs is has not been tried"
    if plan.fused:
        return "what earlier recipes make is computed on the cpu"
    if plan.survey:
        return "what a report tells is found on the cpu"
    programs = programs_of_plan(plan, method)
    if plan.keep_non_finite:
        return f"what is no number may have other bits there{_NO_BIT}"
    if shape_matrices(plan.tasks, programs, plan.compute_dtype.itemsize).count:
        return f"matrices that are decomposed there have other last bits{_NO_BIT}"
    merged = [task for task in plan.tasks if task.action is Action.MERGE]
    if not any(_runs_there(plan, programs, task, fused=True) for task in merged):
        return "nothing of this merge is for it"
    if any(task.whole for task in merged):
        return "how long matrices take that are seen whole is not estimated"
    if not all(has_products_for_device(task.changes) for task in merged):
        return "what adapters change by more than some products is not estimated"
    if any(task.encoding is not None for task in merged):
        return "how long it takes to make codes is not estimated"
    return None


_NO_BIT = ", and an estimate decides no bit; name the device to have it"


def why_not_there(plan: MergePlan, method: MergeMethod) -> str | None:
    """Return why a plan for a device would have other bits than the CPU; None where it has the same.

    Single operations of torch add totals up in an order of their own; fused kernels keep the CPU's.
    """
    programs = programs_of_plan(plan, method)
    fused = plan.device is not None and plan.device.fused
    there = [task for task in plan.tasks if _runs_there(plan, programs, task, fused=fused)]
    if not there:
        return "nothing of this merge is for it without compiled kernels"
    for task in there:
        totals = any(each.totals for each in programs[task.setting].rounds)
        if totals and not (fused and is_fused(task)):
            return f"sums over tensors have other last bits there{_NO_BIT}"
    return None


def estimate_on_cpu(plan: MergePlan, method: MergeMethod, rates: Rates) -> Seconds:
    """Return how long a merge takes on the CPU."""
    programs = programs_of_plan(plan, method)
    loads = [load_cores(plan, programs[task.setting], task) for task in _merged(plan)]
    return _seconds(plan, rates, computing=_compute(plan, rates, sum(loads, CoreLoad())))


def estimate_best(plan: MergePlan, rates: Rates) -> Seconds:
    """Return how long it takes on a device that computes and copies in no time."""
    return _seconds(plan, rates, computing=0.0, start=START_SECONDS)


def estimate_on_device(
    plan: MergePlan, method: MergeMethod, rates: Rates, device: DeviceRates
) -> Seconds:
    """Return how long a merge takes on the device of its plan.

    Args:
        plan: A plan for one device.
        method: Its method.
        rates: The machine's.
        device: The device's.
    """
    assert plan.device is not None  # noqa: S101 - the caller's matter
    programs = programs_of_plan(plan, method)
    fused = plan.device.fused
    shape = plan_step(plan, method, plan.device.step_numel, fused=fused)
    left = CoreLoad()
    loads: list[DeviceLoad] = []
    for task in _merged(plan):
        if shape is None or not _runs_there(plan, programs, task, fused=fused):
            left += load_cores(plan, programs[task.setting], task)
        else:
            left += load_cores_beside(plan.device, task)
            loads.append(load_device(plan, shape, programs[task.setting], task, fused=fused))
    there = sum(_compute_there(each, device) for each in loads)
    kernels = frozenset[tuple[Hashable, int]]().union(*(each.kernels for each in loads))
    compiling = sum(COMPILING_SECONDS + count * PRODUCT_SECONDS for _, count in kernels)
    slots = plan.memory.inputs + plan.memory.outputs
    return _seconds(
        plan,
        rates,
        bus=sum(each.crossing for each in loads) / device.bus,
        computing=max(there, _compute(plan, rates, left)),
        start=START_SECONDS + compiling + slots / device.locking,
    )


def wins(on_device: Seconds, on_cpu: Seconds) -> bool:
    """Return whether a device takes so much less time that an estimate can tell."""
    return on_device.total <= (1 - MARGIN) * on_cpu.total


def _seconds(
    plan: MergePlan, rates: Rates, *, computing: float, bus: float = 0.0, start: float = 0.0
) -> Seconds:
    return Seconds(
        reading=plan.bytes_to_read / rates.read,
        writing=plan.bytes_to_write / rates.write,
        bus=bus,
        computing=computing,
        start=start,
    )


def _merged(plan: MergePlan) -> Iterator[TensorTask]:
    """Yield the tensors that are computed; copies are not."""
    return (task for task in plan.tasks if task.action is Action.MERGE)


def _runs_there(
    plan: MergePlan, programs: Sequence[Programs], task: TensorTask, *, fused: bool
) -> bool:
    itemsize = plan.compute_dtype.itemsize
    return runs_on_device(task, programs, plan.settings, fused=fused, compute_itemsize=itemsize)


def _compute(plan: MergePlan, rates: Rates, load: CoreLoad) -> float:
    """Return how long the CPU takes."""
    seconds = load.values * rates.value_seconds + load.changed * rates.changed_seconds
    seconds += load.terms * rates.term_seconds
    return seconds / min(plan.resources.workers, rates.cores)


def _compute_there(load: DeviceLoad, device: DeviceRates) -> float:
    """Return how long a device takes, but for the bus."""
    asking = load.operations * _ENQUEUING_SECONDS
    return load.moved / device.memory + load.sorted / device.sorting + asking
