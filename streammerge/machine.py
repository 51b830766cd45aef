"""What a plan may use of this machine: memory, threads, devices."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from streammerge.checkpoint.foreseeing import foresee_headers
from streammerge.engine.accelerator import opening
from streammerge.engine.memory import (
    available_memory,
    cgroup_limit,
    default_budget,
    release_free_memory,
    resident_memory,
)
from streammerge.errors import DeviceError, MemoryBudgetError
from streammerge.lazily import load_torch, torch_version
from streammerge.plan.planning import Machine
from streammerge.plan.types import MergePlan
from streammerge.units import BASELINE_NOISE, MIB, format_budget, format_size, parse_size

_READERS = 4
"""Four to eight concurrent requests of some MiB saturate the disks of common machines."""
_STORE_READERS = 16
"""A store answers after tens of milliseconds, however little is asked for: only many at once are fast."""
_WRITERS = 2
"""One waits for the disk while the other hands over pages."""
_MOST_WORKERS = 16
"""Beyond this many compute threads the interpreter lock is the limit, not the arithmetic."""

_LITTLE_PLANNING_BYTES = 24 * MIB
"""What planning may take in any case: a refusal can then name what the whole merge needs."""
_BUFFER_BYTES = 96 * MIB
"""Of what a merge needs when it is planned: the least of one with a few sources."""
_TASK_BYTES = 1_300
"""Of what is planned for one tensor of the output; measured: 700 to 1,200, with what planning frees."""

_WORKERS_PER_DEVICE = 3
"""One whose chunk is copied to the device, one computed, one copied back; more only take memory."""


def describe_machine(
    *,
    memory: int | str | None,
    workers: int | None,
    devices: Sequence[str],
    device_budget: int | None,
    at_once: int = 1,
    from_store: bool = False,
    beside: int = 0,
) -> Machine:
    """Return what a plan may use.

    Args:
        memory: Most private memory, in bytes or as ``"2GiB"``; None for a share of what is available.
        workers: Compute threads; None for one per core, or some per device.
        devices: Names of accelerators.
        device_budget: What :func:`choose_device_budget` returned.
        at_once: Merges that share all of it.
        from_store: Whether something is read over a network.
        beside: Bytes that the process is to have room for beside what it has now.

    Raises:
        DeviceError: A device is not there.
        DeviceLostError: One does not answer.
        ValueError: There are fewer workers than one.
    """
    # Opened before memory is looked at, for the driver takes some that no plan can foresee.
    opened = opening.open_devices(devices)
    free = min((each.free_bytes() for each in opened), default=0)
    return Machine(
        budget=choose_budget(memory),
        baseline=lambda *, torch: measure_baseline(torch=torch) + beside,
        workers=max(1, _choose_workers(workers, devices=len(devices)) // at_once),
        readers=max(1, (_STORE_READERS if from_store else _READERS) // at_once),
        writers=max(1, _WRITERS // at_once),
        devices=tuple(devices),
        device_free=free,
        device_obstacle=next((each.obstacle for each in opened if each.obstacle), None),
        device_budget=device_budget,
        at_once=at_once,
    )


def choose_budget(memory: int | str | None) -> int:
    """Return the most private memory that a merge may have, in bytes; None for a share."""
    if memory is None:
        return default_budget()
    budget = parse_size(memory)
    limit = cgroup_limit()
    return budget if limit is None else min(budget, limit)


def check_planning_room(models: Sequence[tuple[str, Path]], budget: int) -> None:
    """Return if the headers of all models can be parsed and planned within the budget.

    Asked before any of them is parsed, so that a header of a million tensors cannot take more than
    was allowed before anything is known of it.

    Args:
        models: Label and path of each.
        budget: The most memory that the process may have, in bytes.

    Raises:
        MemoryBudgetError: They cannot, by what their sizes say.
    """
    sizes = [foresee_headers(path) for _, path in models]
    kept = sum(each.kept_bytes for each in sizes)
    # A tensor of the output is planned when the headers of all models are there.
    planning = _TASK_BYTES * max((each.tensors for each in sizes), default=0)
    need = kept + max(planning, *(each.parsing_bytes for each in sizes), 0)
    in_use = resident_memory()
    if need <= _LITTLE_PLANNING_BYTES or in_use + need <= budget:
        return
    largest = max(range(len(sizes)), key=lambda index: sizes[index].nbytes)
    label, path = models[largest]
    raise MemoryBudgetError(
        f"the headers of {len(models)} models have {format_size(sum(s.nbytes for s in sizes))} and "
        f"describe up to {sum(s.tensors for s in sizes)} tensors, most of them in {label} ({path}); "
        f"to plan their merge takes up to {format_size(need)}, beside {format_size(in_use)} in use; "
        f"the budget is {format_size(budget)}, give --memory "
        f"{format_budget(in_use + need + _BUFFER_BYTES + BASELINE_NOISE)} or more"
    )


def measure_baseline(*, torch: bool) -> int:
    """Return the resident memory of the process, once it has torch if it will need it."""
    # Asked now, because it takes torch itself to answer where there is no record of it.
    torch_version()
    if torch:
        load_torch()
    # A process that has merged before keeps freed memory, which this merge uses again.
    release_free_memory()
    return resident_memory()


def choose_device_budget(names: Sequence[str], device_memory: int | str | None) -> int | None:
    """Return the most memory that a merge may have of each device, in bytes; None for what is useful.

    Raises:
        DeviceError: There are no devices to give any.
    """
    if device_memory is None:
        return None
    if not names:
        raise DeviceError(
            "device_memory: the device is the cpu, which --memory is for; leave it out, or name a "
            "device with --device cuda:0"
        )
    return parse_size(device_memory)


def _choose_workers(workers: int | None, *, devices: int) -> int:
    if workers is None and devices:
        return _WORKERS_PER_DEVICE * devices
    if workers is None:
        return min(count_cores(), _MOST_WORKERS)
    # Not isinstance: True is an int.
    if type(workers) is not int or workers < 1:
        raise ValueError(f"workers: expected a whole number of at least 1, got {workers!r}")
    return workers


def count_cores() -> int:
    """Return how many cores this process may use."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return available or 1


def fits_page_cache(planned: MergePlan) -> bool:
    """Return whether a second sweep would find all inputs in memory without crowding others out."""
    limit = cgroup_limit()
    available = available_memory()
    room = available if limit is None else min(available, limit - planned.memory.peak)
    return planned.input_nbytes < room // 2
