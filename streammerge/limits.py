"""Limits that the system puts on this process, and the names of what they refuse.

What fails where is not to be foreseen: a limit on address space may show in an import, a buffer or
the start of a thread. So whoever runs a command puts :func:`naming_limits` around all of it.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from streammerge.errors import OutOfMemoryError, PlanError, StreamMergeError, SystemLimitError
from streammerge.units import MIB, format_size

LEAST_ADDRESS_SPACE = 128 * MIB
"""Address space below which numpy's BLAS ends the process while it is imported, with a message of
its own. More is needed to merge; what refuses then can be caught and named."""

SHOWN_LIMITS: Mapping[str, str | None] = {
    "open files": "RLIMIT_NOFILE",
    "processes and threads": "RLIMIT_NPROC",
    "address space": "RLIMIT_AS",
    "file size": "RLIMIT_FSIZE",
    "tasks of the control group": None,
}
"""Limits that a merge may meet, and what the system calls them; one is the control group's."""

_NO_THREAD = "can't start new thread"
"""What the interpreter says, in a RuntimeError, whichever limit it was."""
_NO_MEMORY = (
    "failed to map segment",  # the dynamic linker, in an ImportError or OSError
    "annot allocate memory",  # the system
    "can't allocate",  # torch's allocator, memory; the interpreter, a lock; in a RuntimeError
)
_CGROUP_LIST = Path("/proc/self/cgroup")
_CGROUP_ROOT = Path("/sys/fs/cgroup")
_OPEN_FILES_ERRORS = frozenset({errno.EMFILE, errno.ENFILE})
_OTHER_FILES = 256
"""Files that the process may have open beside the merge's own, where there are enough to be had."""
_SPARE_FILES = 4
"""Files that a merge has open beside inputs and shards: lock and journal, and for a moment a
snapshot, a directory, or what lies beside the shards, of which one is open at a time."""


def allow_open_files(count: int) -> None:
    """Raise this process's limit of open files so that it can open ``count`` more.

    A merge of eight models of 160 shards keeps 1,300 files open; the usual soft limit is 1,024.

    Raises:
        SystemLimitError: The hard limit is lower than what is needed.
    """
    resource = _resource()
    if resource is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return
    needed = _open_files() + count + _SPARE_FILES
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise SystemLimitError(
            f"the merge has {count} input and output files open at once, which takes a limit of "
            f"{needed} for the process; it is {hard}: raise it with `ulimit -Hn {needed}` (as root), "
            "or merge into fewer, larger shards first"
        )
    wanted = max(needed, count + _OTHER_FILES)
    if soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def check_address_space() -> None:
    """Return if the limit of address space leaves enough for the libraries to be imported.

    Raises:
        OutOfMemoryError: It does not.
    """
    limit = _limit("RLIMIT_AS")
    if limit is not None and limit < LEAST_ADDRESS_SPACE:
        raise OutOfMemoryError(
            f"the process may have {format_size(limit)} of address space, and the libraries alone "
            f"take {format_size(LEAST_ADDRESS_SPACE)}; raise the limit: `ulimit -v unlimited`"
        )


@contextmanager
def naming_limits() -> Iterator[None]:
    """Give a name to what a limit of the system refuses, wherever it shows."""
    try:
        yield
    except StreamMergeError:
        raise
    except (MemoryError, RuntimeError, OSError, ImportError) as error:
        named = name_limit(error)
        if named is None:
            raise
        raise named from error


def name_limit(error: BaseException) -> PlanError | None:
    """Return the error that says which limit of the system ``error`` shows; None if it shows none."""
    said = str(error)
    if isinstance(error, RuntimeError) and _NO_THREAD in said:
        return SystemLimitError(
            "the system starts no more threads for this process "
            f"({_thread_limits() or 'it gives no reason'}); raise the limit, or give a smaller "
            "--workers, then continue with --resume"
        )
    if isinstance(error, OSError) and error.errno in _OPEN_FILES_ERRORS:
        return SystemLimitError(
            f"{error.filename or 'a file'}: cannot be opened: {error.strerror}; the process may "
            f"have {_limit('RLIMIT_NOFILE')} open at once: raise the limit, `ulimit -n 4096`"
        )
    if (
        isinstance(error, MemoryError)
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or any(words in said for words in _NO_MEMORY)
    ):
        address_space = _limit("RLIMIT_AS")
        remedy = (
            "free some or give a smaller --memory"
            if address_space is None
            else f"the process may have {format_size(address_space)} of address space: raise the "
            "limit, `ulimit -v unlimited`, or give a smaller --memory and fewer --workers"
        )
        return OutOfMemoryError(
            f"the system refused memory ({_first_line(said) or type(error).__name__}); {remedy}, "
            "then continue with --resume"
        )
    return None


def _first_line(text: str) -> str:
    # numpy wraps what the linker said into advice of forty lines; it stands in the last one.
    lines = [line for line in text.splitlines() if any(words in line for words in _NO_MEMORY)]
    return (lines or text.splitlines() or [""])[0].strip()


def _thread_limits() -> str:
    """Return the limits that are set and may be what refused a thread."""
    address_space = _limit("RLIMIT_AS")
    limits = {
        "address space, ulimit -v": address_space and format_size(address_space),
        "processes and threads of the user, ulimit -u": _limit("RLIMIT_NPROC"),
        "tasks, pids.max of the control group": _cgroup_tasks(),
    }
    return "; ".join(f"{name}: {value}" for name, value in limits.items() if value is not None)


def _limit(name: str) -> int | None:
    """Return a soft limit of this process; None without one."""
    resource = _resource()
    kind = None if resource is None else getattr(resource, name, None)
    if resource is None or kind is None:
        return None
    soft = int(resource.getrlimit(kind)[0])
    return None if soft == resource.RLIM_INFINITY else soft


def limit_of(name: str) -> int | None:
    """Return a limit of this process by its name in :data:`SHOWN_LIMITS`; None without one."""
    return _cgroup_tasks() if SHOWN_LIMITS[name] is None else _limit(SHOWN_LIMITS[name] or "")


def _cgroup_tasks() -> int | None:
    """Return the limit of tasks of this process's control group, v2 or v1; None without one."""
    with contextlib.suppress(OSError, ValueError):
        for line in _CGROUP_LIST.read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if controllers in {"", "pids"}:
                text = (
                    (_CGROUP_ROOT / controllers / group.lstrip("/") / "pids.max")
                    .read_text()
                    .strip()
                )
                return int(text) if text.isdecimal() else None
    return None


def _open_files() -> int:
    """Return how many files the process has open; the usual three where that cannot be told."""
    for listing in ("/proc/self/fd", "/dev/fd"):
        with contextlib.suppress(OSError):
            return len(os.listdir(listing)) - 1  # noqa: PTH208 - the listing is one of them itself
    return 3


def _resource() -> ModuleType | None:
    """Return the module of limits, which POSIX systems have."""
    return importlib.import_module("resource") if os.name == "posix" else None
