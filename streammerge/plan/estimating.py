"""How long a merge would take on the CPU and on a device, by rates that somebody has measured.

Stages go on side by side, so that a merge takes as long as the longest of them:

    reading     bytes to read / rate of the inputs
    writing     bytes to write / rate of writing
    computing   values of merged inputs · seconds per value and core / cores
    bus         bytes that cross / rate of page-locked copies
    there       bytes of device memory moved / its rate of copying, and a moment per operation

On a device computing is the longer of what is done there and what is left to the CPU, and the start comes before
everything. An estimate decides speed and nothing else, so where a device has other last bits than the CPU, or
what a merge does is not in the sum, :func:`why_not` says so, and nothing is estimated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from streammerge.assignment.types import Action
from streammerge.methods.base import MergeMethod
from streammerge.methods.programs import Programs
from streammerge.plan.choice import Seconds
from streammerge.plan.device_matrices import shape_matrices
from streammerge.plan.devices import StepShape, is_fused, plan_step, runs_on_device
from streammerge.plan.sweeps import asks, programs_of_plan
from streammerge.plan.types import MergePlan, TensorTask
from streammerge.tiles.program import Op, Program, Step

MARGIN = 0.2
"""By how much of the CPU's time a device must win: rates of a moment are off by about as much."""
START_SECONDS = 3.0
"""To import torch, for the driver to make a context, and for libraries to load their kernels. An estimate, of
which torch is 1.3."""
COMPILING_SECONDS = 1.0
"""For Triton to compile one kernel that it has not compiled before. An estimate."""
_ENQUEUING_SECONDS = 1e-5
"""To ask a device for one operation from Python. An estimate, twice what torch takes."""
_RANDOM_OPERATIONS = 400
"""Single operations that a random mask takes."""
_RANKING_OPERATIONS = 20
"""Those that find a ranked value's place among the collected and the counted ones."""
_RANKING_KERNELS = 2
"""Fused ones that do it."""
_MOVED_ITEMSIZE = 12
"""Bytes that a single operation moves per element: two float32 read, one written."""
_FUSED_SHARE = 0.25
"""Of the rate of copying, what a fused kernel reaches, which computes meanwhile. An estimate, on the safe side."""


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


@dataclass(frozen=True, slots=True)
class DeviceRates:
    """How fast a device is."""

    bus: float
    """Bytes per second that are copied to it from page-locked memory."""
    memory: float
    """Bytes per second that are copied within its memory, each counted as read and written."""
    locking: float
    """Bytes per second of host memory that are page-locked."""


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
    if not any(runs_on_device(task, programs, plan.settings, fused=True) for task in merged):
        return "nothing of this merge is for it"
    if any(task.changes for task in merged):
        return "how long products of adapters take is not estimated"
    if any(task.row for task in merged):
        return "how long what is asked about rows takes is not estimated"
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
    there = [
        task for task in plan.tasks if runs_on_device(task, programs, plan.settings, fused=fused)
    ]
    if not there:
        return "nothing of this merge is for it without compiled kernels"
    for task in there:
        totals = any(each.totals for each in programs[task.setting].rounds)
        if totals and not (fused and is_fused(task)):
            return f"sums over tensors have other last bits there{_NO_BIT}"
    return None


def estimate_on_cpu(plan: MergePlan, rates: Rates) -> Seconds:
    """Return how long a merge takes on the CPU."""
    values = sum(_count_values(task) for task in plan.tasks)
    return _seconds(plan, rates, computing=_compute(plan, rates, values))


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
    left, crossing, there = 0, 0, 0.0
    kernels: set[tuple[Step, ...]] = set()
    for task in plan.tasks:
        if not runs_on_device(task, programs, plan.settings, fused=fused):
            left += _count_values(task)
            continue
        by_kernel = fused and is_fused(task)
        one = programs[task.setting]
        passes = [*_rounds_of(plan, one, task), one.merge]
        stored = sum(entry.dtype.itemsize for entry in task.inputs if entry is not None)
        made = task.numel * task.made_dtype.itemsize
        crossing += _crossings(plan, shape, task, len(passes)) * task.numel * stored + made
        steps = -(-task.numel // plan.device.step_numel)
        for each in passes:
            moved, operations = _load_of(each, stored, by_kernel=by_kernel)
            there += task.numel * moved / device.memory
            there += steps * operations * _ENQUEUING_SECONDS
        there += made / device.memory
        if by_kernel:
            # Programs that differ in numbers alone share a kernel.
            kernels.update(each.steps for each in passes)
    slots = plan.memory.inputs + plan.memory.outputs
    return _seconds(
        plan,
        rates,
        bus=crossing / device.bus,
        computing=max(there, _compute(plan, rates, left)),
        start=START_SECONDS + len(kernels) * COMPILING_SECONDS + slots / device.locking,
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


def _compute(plan: MergePlan, rates: Rates, values: int) -> float:
    """Return how long the CPU takes for so many values of inputs."""
    return values * rates.value_seconds / min(plan.resources.workers, rates.cores)


def _count_values(task: TensorTask) -> int:
    """Return the values of inputs that are merged to a tensor; copies are not computed."""
    if task.action is not Action.MERGE:
        return 0
    return task.numel * sum(entry is not None for entry in task.inputs)


def _rounds_of(plan: MergePlan, programs: Programs, task: TensorTask) -> Sequence[Program]:
    """Return the rounds in which a tensor is measured."""
    if programs.rounds and (plan.model_scope or asks(programs, task.numel)):
        return programs.rounds
    return ()


def _crossings(plan: MergePlan, shape: StepShape | None, task: TensorTask, passes: int) -> int:
    """Return how often the inputs of a tensor cross the bus: once, if all of them stay there until the merge.

    Those of a sweep over the whole model are let go before the next one begins.
    """
    if shape is None or plan.device is None or plan.model_scope:
        return passes
    kept = plan.device.kept_pieces * shape.chunk_numel
    return 1 if task.numel <= kept else passes


def _load_of(program: Program, stored: int, *, by_kernel: bool) -> tuple[float, int]:
    """Return the bytes of device memory that a program moves per element, and its operations per step.

    Args:
        program: A round, or the merge.
        stored: Bytes per element of all inputs.
        by_kernel: Whether it is one kernel; else every step is an operation of its own.
    """
    sinks = program.ranked + len(program.totals)
    if by_kernel:
        sinks += program.ranked * _RANKING_KERNELS
        return stored / _FUSED_SHARE + sinks * _MOVED_ITEMSIZE, 1 + sinks
    single = sum(_operations(program)) + program.ranked * _RANKING_OPERATIONS + sinks
    return stored + single * _MOVED_ITEMSIZE, single


def _operations(program: Program) -> Iterator[int]:
    for step in program.steps:
        yield _RANDOM_OPERATIONS if step.op is Op.KEEP_RANDOM else 1
