"""What ``--device auto`` comes to: a plan for the CPU, or one for the device that an estimate says wins.

The CPU is looked at first, and the device is opened only if one that computes in no time would win: torch is not
imported to find out that the disk is the limit. What has been measured decides no byte of the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from streammerge.engine.accelerator import opening
from streammerge.errors import (
    DependencyError,
    DeviceError,
    DeviceLostError,
    MemoryBudgetError,
    OutOfMemoryError,
)
from streammerge.plan.asking import find_method
from streammerge.plan.choice import DeviceChoice, Seconds, brief
from streammerge.plan.estimating import (
    MARGIN,
    DeviceRates,
    Rates,
    estimate_best,
    estimate_on_cpu,
    estimate_on_device,
    why_not,
    why_not_there,
    wins,
)
from streammerge.plan.sweeps import programs_of_plan
from streammerge.plan.types import MergePlan
from streammerge.probing import device as probing_device
from streammerge.probing import host as probing_host
from streammerge.units import MIB, format_size

HOST_ROOM_BYTES = 1024 * MIB
"""What torch, the driver and its libraries take of the process: what does not fit the budget beside the merge
rules a device out, before it is opened. An estimate."""

_NO_ROOM = f"its driver and torch may take {format_size(HOST_ROOM_BYTES)} of the process, which --memory has not"


class PlanFor(Protocol):
    """Plans the same merge for other devices."""

    def __call__(self, devices: Sequence[str], *, beside: int = 0) -> MergePlan:
        """Return a plan for some devices; none for the CPU.

        Args:
            devices: Their names.
            beside: Bytes that the process is to have room for beside what it has now.

        Raises:
            MemoryBudgetError: The merge does not fit.
            DeviceError: The device is not there, or does not answer.
        """
        ...


def decide(planned: MergePlan, candidate: str, plan_for: PlanFor, *, at_once: int) -> MergePlan:
    """Return the plan that is to run, and in it what decided.

    Args:
        planned: The plan for the CPU.
        candidate: The device.
        plan_for: Plans again.
        at_once: Merges that share this machine.

    Raises:
        MemoryBudgetError: The device was opened, the CPU won, and what the driver takes leaves too little
            for the merge.
    """
    method = find_method(planned.method)
    reason = why_not(planned, method)
    if at_once > 1:
        reason = "merges side by side are computed on the cpu"
    elif planned.memory.baseline + HOST_ROOM_BYTES >= planned.memory.budget:
        # Seen before anything is measured, which takes some memory, too.
        reason = _NO_ROOM
    if reason is not None:
        return stay(planned, candidate, reason)
    rates = probing_host.measure_host(planned, method)
    if isinstance(rates, str):
        return stay(planned, candidate, rates)
    on_cpu = estimate_on_cpu(planned, method, rates)
    best = estimate_best(planned, rates)
    if not wins(best, on_cpu):
        return stay(planned, candidate, _why_none_would(on_cpu, best), on_cpu)
    try:
        plan_for((), beside=HOST_ROOM_BYTES)
    except MemoryBudgetError:
        return stay(planned, candidate, _NO_ROOM, on_cpu)
    ranks = any(each.row_ranks is not None for each in programs_of_plan(planned, method))
    there = _look_there(candidate, plan_for, rates, ranks=ranks)
    if isinstance(there, str):
        # Torch is imported, so that memory is another than when the CPU was planned for.
        return stay(plan_for(()), candidate, there, on_cpu)
    on_device, plan = there
    cores = min(planned.resources.workers, rates.cores)
    if not wins(on_device, on_cpu):
        told = _both(on_device, on_cpu, cores)
        reason = f"{told}, which is less than {MARGIN:.0%} to win"
        return stay(plan_for(()), candidate, reason, on_cpu, on_device)
    told = _both(on_device, on_cpu, cores)
    return replace(plan, choice=DeviceChoice(candidate, True, told, on_cpu, on_device))


def stay(
    planned: MergePlan,
    candidate: str,
    reason: str,
    on_cpu: Seconds | None = None,
    on_device: Seconds | None = None,
) -> MergePlan:
    """Return a plan for the CPU that says why it is one."""
    return replace(planned, choice=DeviceChoice(candidate, False, reason, on_cpu, on_device))


def _look_there(
    candidate: str, plan_for: PlanFor, rates: Rates, *, ranks: bool
) -> tuple[Seconds, MergePlan] | str:
    """Open a device, plan for it and measure it; return the estimate and the plan, or why there is none."""
    try:
        if not opening.count_devices():
            return opening.why_none()
        measured = _measure(candidate, ranks=ranks)
        if isinstance(measured, str):
            return measured
        plan = plan_for((candidate,))
    except DependencyError as error:
        return str(error)
    except (MemoryBudgetError, DeviceError, DeviceLostError) as error:
        return f"it cannot be used ({error})"
    method = find_method(plan.method)
    reason = why_not_there(plan, method)
    if reason is not None:
        return reason
    return estimate_on_device(plan, method, rates, measured), plan


def _measure(candidate: str, *, ranks: bool) -> DeviceRates | str:
    (backend,) = opening.open_devices([candidate])
    free = backend.free_bytes()
    if free < probing_device.ROOM_BYTES:
        return f"only {format_size(free)} of its memory are free"
    try:
        return probing_device.measure_device(backend, ranks=ranks)
    except (RuntimeError, OutOfMemoryError) as error:
        first = str(error).split("\n", maxsplit=1)[0]
        return f"a moment of copies there failed ({first})"


def _why_none_would(on_cpu: Seconds, best: Seconds) -> str:
    if on_cpu.limit in ("reading", "writing"):
        seconds = on_cpu.total
        return f"{on_cpu.limit} takes {brief(seconds)} either way"
    return (
        f"computing takes {brief(on_cpu.computing)}, and on any device the merge would take "
        f"{brief(best.total)} or more"
    )


def _both(on_device: Seconds, on_cpu: Seconds, cores: int) -> str:
    return (
        f"{brief(on_device.total)} ({on_device.told()}) instead of {brief(on_cpu.total)} on {cores} "
        f"core{'s' if cores > 1 else ''} ({on_cpu.told()}), with writing as fast as reading"
    )
