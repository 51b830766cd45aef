"""Memory: what this process uses now, and what it may use."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
from pathlib import Path

import psutil

from streammerge.units import KIB, MIB

_CGROUP_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)
_LEAST_DEFAULT = 512 * MIB


class PeakMemory:
    """The largest resident memory seen."""

    def __init__(self) -> None:
        """Look once."""
        self.nbytes = resident_memory()

    def look(self) -> None:
        """Look again."""
        self.nbytes = max(self.nbytes, resident_memory())


def resident_memory() -> int:
    """Return the process's resident memory in bytes: all that is private, and shared code.

    What is private alone cannot be held to a limit: code pages of libraries turn from shared to
    private when another process that uses them ends. Resident memory counts them always, so a
    bound on it is a bound on private memory. Page cache that is not mapped does not count.
    """
    try:
        return int(psutil.Process().memory_info().rss)
    except (OSError, psutil.Error):
        # Linux tells it in /proc, which some containers lack. The largest it ever was is no less.
        resource = importlib.import_module("resource")
        return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * KIB


def available_memory() -> int:
    """Return the memory that the system could give to this process now, in bytes."""
    try:
        return int(psutil.virtual_memory().available)
    except (OSError, psutil.Error):
        # Without /proc, what the C library knows; it does not count cached files, which could go.
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def total_memory() -> int:
    """Return the memory of the machine, in bytes."""
    try:
        return int(psutil.virtual_memory().total)
    except (OSError, psutil.Error):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def release_free_memory() -> None:
    """Give freed memory back to the system where the allocator keeps it; others do so by themselves."""
    # Through the interpreter's own handle: no library is loaded for it.
    with contextlib.suppress(AttributeError):
        ctypes.pythonapi.malloc_trim(ctypes.c_size_t(0))


def default_budget() -> int:
    """Return a quarter of what is available, at least 512 MiB, at most what the cgroup allows."""
    budget = max(_LEAST_DEFAULT, available_memory() // 4)
    limit = cgroup_limit()
    return budget if limit is None else min(budget, limit)


def cgroup_limit() -> int | None:
    """Return the memory limit of this process's cgroup in bytes, v2 or v1; None without one."""
    limits = []
    for path in [*_own_cgroup_files(), *_CGROUP_LIMITS]:
        try:
            text = path.read_text().strip()
        except OSError:
            continue
        # v2 says "max", v1 a number near 2^63, where there is no limit.
        if text.isdecimal() and int(text) < total_memory():
            limits.append(int(text))
    return min(limits, default=None)


def _own_cgroup_files() -> list[Path]:
    """Return the limit files of this process's cgroup and all above it."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    files = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, name = Path("/sys/fs/cgroup"), "memory.max"
        elif "memory" in controllers.split(","):
            root, name = Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"
        else:
            continue
        group = root / path.lstrip("/")
        files += [each / name for each in (group, *group.parents) if each.is_relative_to(root)]
    return files
