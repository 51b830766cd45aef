"""Runs a command and tells what it took: time, memory and bytes of its whole tree of processes.

Time and CPU seconds come from the kernel, without sampling. Memory is looked up every 50 ms:
*private* is memory that no file stands behind (``RssAnon`` and ``RssShmem``), which the system cannot
take back; *resident* adds mapped files, such as libraries and mapped checkpoints, and is the
kernel's own high-water mark of every process.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

SAMPLE_SECONDS = 0.05
"""Between two looks. Shorter would take time from what is measured."""
_KEPT_CHARACTERS = 300
"""Of a failure's last line: enough for a message, too little for a dump."""


@dataclass(frozen=True, slots=True)
class Run:
    """What one run of a command took."""

    wall_seconds: float
    """From its start to its end."""
    user_seconds: float
    """CPU time in user mode, of all its processes."""
    system_seconds: float
    """CPU time in the kernel, of all its processes."""
    peak_private_nbytes: int
    """Largest sum of memory without a file behind it that was seen."""
    peak_resident_nbytes: int
    """Largest sum of resident memory seen, mapped files included."""
    disk_read_nbytes: int | None
    """Bytes that came from the disk, not from the page cache; None where the system does not tell."""
    disk_written_nbytes: int | None
    """Bytes sent to the disk, now or later; None where the system does not tell."""
    failure: str | None
    """Why it failed; None when it succeeded."""

    @property
    def cpu_seconds(self) -> float:
        """User and system time."""
        return self.user_seconds + self.system_seconds


def measure(
    command: Sequence[str],
    *,
    cwd: Path,
    environment: Mapping[str, str],
    timeout_seconds: float,
    stdout: Path | None = None,
) -> Run:
    """Run a command to its end and return what it took; a failure is part of the answer.

    Args:
        command: Program and arguments.
        cwd: Where it runs.
        environment: Variables to set beside those of this process.
        timeout_seconds: After this long it is killed, which counts as a failure.
        stdout: Where its output goes; None drops it.
    """
    with (
        tempfile.TemporaryFile() as errors,
        Path(stdout or os.devnull).open("wb") as output,
    ):
        started = time.perf_counter()
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            start_new_session=True,
        )
        _prefer_as_victim(process.pid)
        watcher = _MemoryWatcher(process.pid, deadline=time.monotonic() + timeout_seconds)
        try:
            with watcher:
                # Left unreaped, so that /proc still tells what it read and wrote.
                os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
                wall_seconds = time.perf_counter() - started
            read_nbytes, written_nbytes = _disk_nbytes(process.pid)
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            kill_group(process.pid)
            process.wait()
            raise
        process.returncode = os.waitstatus_to_exitcode(status)
        # What it left running must not disturb the next run.
        kill_group(process.pid)
        errors.seek(0)
        text = errors.read().decode(errors="replace")
    return Run(
        wall_seconds=wall_seconds,
        user_seconds=usage.ru_utime,
        system_seconds=usage.ru_stime,
        peak_private_nbytes=watcher.peak_private_nbytes,
        peak_resident_nbytes=watcher.peak_resident_nbytes,
        disk_read_nbytes=read_nbytes,
        disk_written_nbytes=written_nbytes,
        failure=_describe_failure(process.returncode, text, timed_out=watcher.timed_out),
    )


def kill_group(pid: int) -> None:
    """Kill a process that leads a group of its own, and all of the group."""
    # Nothing left to kill is what is wanted.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def drop_page_cache(paths: Sequence[Path], *, everything: bool) -> str:
    """Make the next reads of ``paths`` come from the disk, and return how that was done.

    Args:
        paths: Files that will be read.
        everything: Whether the kernel may be asked to drop all it has cached, programs and
            libraries included; it is, where this process may do so.
    """
    os.sync()
    if everything:
        try:
            Path("/proc/sys/vm/drop_caches").write_text("3\n", encoding="ascii")
        except OSError:
            pass
        else:
            return "all caches of the kernel, programs included (drop_caches)"
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    return "the inputs alone (posix_fadvise), programs stay cached"


class _MemoryWatcher:
    """Looks at the memory of a tree of processes until it is left; kills it after the deadline."""

    def __init__(self, pid: int, *, deadline: float) -> None:
        self.peak_private_nbytes = 0
        self.peak_resident_nbytes = 0
        self.timed_out = False
        self._pid = pid
        self._deadline = deadline
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(SAMPLE_SECONDS):
            private = resident = 0
            for pid in _iter_tree(self._pid):
                fields = _memory_fields(pid)
                private += fields.get("RssAnon", 0) + fields.get("RssShmem", 0)
                resident += fields.get("VmHWM", 0)
            self.peak_private_nbytes = max(self.peak_private_nbytes, private)
            self.peak_resident_nbytes = max(self.peak_resident_nbytes, resident)
            if time.monotonic() > self._deadline:
                self.timed_out = True
                kill_group(self._pid)
                return


def _iter_tree(root: int) -> list[int]:
    """Return a process and all its descendants."""
    tree = [root]
    for pid in tree:
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            # A thread may end between listing and reading.
            with contextlib.suppress(OSError):
                tree += [int(child) for child in children.read_text(encoding="ascii").split()]
    return tree


def _memory_fields(pid: int) -> dict[str, int]:
    """Return the sizes that the kernel states for a process, in bytes; nothing once it has ended."""
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return {}
    rows = (line.split() for line in text.splitlines() if line.endswith(" kB"))
    return {row[0].rstrip(":"): int(row[1]) * 1024 for row in rows}


def _disk_nbytes(pid: int) -> tuple[int | None, int | None]:
    """Return the bytes that an ended, unreaped process and its children read and wrote."""
    try:
        text = Path(f"/proc/{pid}/io").read_text(encoding="ascii")
    except OSError:
        return None, None
    fields = dict(line.split(": ") for line in text.splitlines())
    return int(fields["read_bytes"]), int(fields["write_bytes"])


def _prefer_as_victim(pid: int) -> None:
    """Have the kernel kill this process first, if memory runs out, and not a bystander."""
    # It may have ended already; a system without the file has no such choice.
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/oom_score_adj").write_text("1000", encoding="ascii")


def _describe_failure(exit_code: int, errors: str, *, timed_out: bool) -> str | None:
    if timed_out:
        return "took longer than the time limit"
    if exit_code == 0:
        return None
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    last = lines[-1][-_KEPT_CHARACTERS:] if lines else "nothing on standard error"
    if exit_code == -signal.SIGKILL:
        return f"killed, as the system does when memory runs out; last line: {last}"
    return f"exit code {exit_code}: {last}"
