"""What a machine and an installation have for merges: versions, kernels, devices, memory, disk, extras.

Nothing here changes how a merge runs; it says what a merge would find, and what would make it better.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from streammerge.cli.probing import Rate, probe_directory
from streammerge.engine.accelerator import driver, opening
from streammerge.engine.memory import available_memory, cgroup_limit, default_budget, total_memory
from streammerge.errors import DependencyError, OutputError
from streammerge.lazily import torch
from streammerge.limits import SHOWN_LIMITS, limit_of
from streammerge.machine import count_cores
from streammerge.native.library import Kernels, find_kernels
from streammerge.plan.estimating import MARGIN
from streammerge.units import format_size
from streammerge.version import VERSION

_NAME = "streammerge"
_FOR_DEVELOPERS = frozenset({"dev", "docs"})
"""Extras that no merge uses."""
_NEEDS_TORCH = (
    "float64, float8 and other types that the kernels do not take, whole matrices (`svd`, `iso_c`, "
    "`tsv_m`), adapters of some kinds, and GPUs"
)


@dataclass(frozen=True, slots=True)
class Extra:
    """Libraries that something more needs, installed with ``pip install 'streammerge[NAME]'``."""

    name: str
    """What it is called."""
    missing: tuple[str, ...]
    """The libraries that are not installed; none where it is complete."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What was found."""

    versions: dict[str, str | None]
    """Of this package, Python, and what it is installed with; None for what is missing."""
    system: str
    """The operating system, its version and the processor's kind."""
    kernels: str | None
    """The file of the compiled kernels in use."""
    why_no_kernels: str | None
    """Why there are none."""
    devices: tuple[str, ...]
    """Accelerators that ``--device`` takes, and what they are."""
    why_no_devices: str | None
    """Why there are none."""
    auto: str
    """What ``--device auto`` comes to."""
    cores: int
    """That this process may use."""
    memory: int
    """Of the machine, in bytes."""
    available: int
    """That the system could give now, in bytes."""
    cgroup: int | None
    """What the control group allows, in bytes; None without a limit."""
    budget: int
    """What a merge without ``--memory`` would take at most, in bytes."""
    limits: dict[str, int]
    """Those of the system that are set, by the name that ``ulimit`` has for them."""
    directory: str | None
    """Where the disk was tried; None if it was not."""
    read_per_second: float | None
    """Bytes per second from that disk."""
    write_per_second: float | None
    """Bytes per second to it."""
    why_no_rates: str | None
    """Why it could not be tried."""
    extras: tuple[Extra, ...]
    """Complete or not."""
    advice: tuple[str, ...]
    """What would make merges possible, or faster."""


def examine(directory: Path | None) -> Machine:
    """Return what is here for merges.

    Args:
        directory: Where to try the disk; None leaves it alone.
    """
    versions = _versions()
    kernels = find_kernels()
    devices, why_no_devices = _devices() if versions["torch"] else ((), "torch is not installed")
    rates: tuple[Rate, Rate] | None = None
    why_no_rates: str | None = None
    if directory is not None:
        try:
            rates = probe_directory(directory)
        except OutputError as error:
            why_no_rates = str(error)
    found = isinstance(kernels, Kernels)
    return Machine(
        versions=versions,
        system=platform.platform(),
        kernels=str(kernels.path) if isinstance(kernels, Kernels) else None,
        why_no_kernels=kernels if isinstance(kernels, str) else None,
        devices=devices,
        why_no_devices=why_no_devices,
        auto=_auto(devices),
        cores=count_cores(),
        memory=total_memory(),
        available=available_memory(),
        cgroup=cgroup_limit(),
        budget=default_budget(),
        limits={name: value for name in SHOWN_LIMITS if (value := limit_of(name)) is not None},
        directory=None if directory is None else str(directory),
        read_per_second=None if rates is None else rates[0].per_second,
        write_per_second=None if rates is None else rates[1].per_second,
        why_no_rates=why_no_rates,
        extras=_extras(),
        advice=tuple(_advise(versions, kernels=found)),
    )


def as_json(machine: Machine) -> dict[str, object]:
    """Return what was found as plain values."""
    return asdict(machine)


def render(machine: Machine) -> str:
    """Return what was found as a table for people."""
    versions = [f"{name} {version or 'missing'}" for name, version in machine.versions.items()]
    rows = [
        ("versions", ", ".join(versions)),
        ("system", f"{machine.system}, {machine.cores} cores for this process"),
        ("kernels", machine.kernels or f"none: {machine.why_no_kernels}"),
        ("devices", ", ".join(machine.devices) or f"the cpu alone: {machine.why_no_devices}"),
        ("auto", machine.auto),
        ("memory", _memory(machine)),
        ("limits", ", ".join(f"{name} {value}" for name, value in machine.limits.items())),
        ("disk", _disk(machine)),
        (
            "extras",
            ", ".join(
                f"{each.name} (missing: {', '.join(each.missing)})" if each.missing else each.name
                for each in machine.extras
            ),
        ),
        *(("advice", line) for line in machine.advice),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows if value)


def _memory(machine: Machine) -> str:
    limit = "no limit" if machine.cgroup is None else format_size(machine.cgroup)
    return (
        f"{format_size(machine.memory)}, of which {format_size(machine.available)} available; control "
        f"group: {limit}; a merge without --memory takes up to {format_size(machine.budget)}"
    )


def _disk(machine: Machine) -> str:
    if machine.read_per_second is None or machine.write_per_second is None:
        return machine.why_no_rates or "not tried"
    return (
        f"{machine.directory}: reads {format_size(int(machine.read_per_second))}/s, writes "
        f"{format_size(int(machine.write_per_second))}/s, by a short probe"
    )


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {_NAME: VERSION, "python": platform.python_version()}
    for name in _required(extra=None):
        found[name] = _version(name)
    return found


def _devices() -> tuple[tuple[str, ...], str | None]:
    """Return the devices of torch, which is imported for it; or why there are none."""
    try:
        cuda = torch.cuda
    except DependencyError as error:
        return (), str(error)
    if not cuda.is_available():
        return (), f"torch {torch.__version__} finds no CUDA device"
    names = (f"cuda:{at} ({cuda.get_device_name(at)})" for at in range(cuda.device_count()))
    return tuple(names), None


def _auto(devices: Sequence[str]) -> str:
    """Say which device merges take if none is named."""
    if not driver.count_driver_devices():
        return "the cpu: no CUDA driver has a device here"
    why = opening.why_no_cuda() or (None if devices else "torch finds no CUDA device")
    if why is not None:
        return f"the cpu: there is a CUDA driver, but {why}"
    return (
        f"{opening.find_candidate()}, where a plan's estimate says that it takes {MARGIN:.0%} less time than "
        "the cpu, with the same bits; `streammerge plan` says which"
    )


def _extras() -> tuple[Extra, ...]:
    try:
        metadata = importlib.metadata.metadata(_NAME)
    except importlib.metadata.PackageNotFoundError:
        return ()
    names = sorted(set(metadata.get_all("Provides-Extra") or ()) - _FOR_DEVELOPERS)
    return tuple(
        Extra(name, tuple(each for each in _required(extra=name) if _version(each) is None))
        for name in names
    )


def _required(*, extra: str | None) -> list[str]:
    """Return the libraries that this package, or one of its extras, declares."""
    try:
        declared = importlib.metadata.requires(_NAME) or []
    except importlib.metadata.PackageNotFoundError:
        # Run from its sources, without being installed.
        return ["torch", "safetensors", "numpy"] if extra is None else []
    names = []
    for line in declared:
        of = re.search(r"extra\s*==\s*[\"']([^\"']+)[\"']", line)
        name = re.match(r"[A-Za-z0-9._-]+", line)
        if name is not None and (None if of is None else of[1]) == extra:
            names.append(name[0])
    return names


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _advise(versions: dict[str, str | None], *, kernels: bool) -> list[str]:
    lines = []
    missing = [name for name, version in versions.items() if version is None and name != "torch"]
    if missing:
        lines.append(
            f"install what is missing: {sys.executable} -m pip install {' '.join(missing)}"
        )
    if versions["torch"] is None:
        without = "merges usual types without it" if kernels else "cannot merge without it"
        lines.append(f"torch is missing; this machine {without}; what needs it: {_NEEDS_TORCH}")
    if not kernels:
        lines.append(
            "merges compute several times slower without the compiled kernels; a wheel has them, or "
            "install from sources with a C compiler"
        )
    if os.name == "posix" and (limit_of("open files") or 1024) < 1024:
        lines.append("models of many shards need more open files: ulimit -n 4096")
    return lines
