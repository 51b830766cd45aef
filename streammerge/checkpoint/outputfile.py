"""Output files: preallocated, written at any position from any thread, synced as they grow.

Memory: nothing is buffered here. The system holds at most :data:`SYNC_BYTES` of unwritten pages
per writing thread and file, because whoever crosses that mark waits for the disk.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from streammerge.checkpoint.journal import PieceDone
from streammerge.checkpoint.ownfiles import NEW_NAME, create_own, open_own
from streammerge.checkpoint.runs import Runs
from streammerge.errors import DiskSpaceError, OutputError, StreamMergeError
from streammerge.limits import name_limit
from streammerge.units import MIB, format_size

SYNC_BYTES = 64 * MIB
"""Written bytes between two syncs of a file. Smaller windows cost disk round trips; larger ones let
dirty pages pile up, which stalls small machines and counts against a memory cgroup."""


_MOUNTS = Path("/proc/self/mountinfo")
_IN_MEMORY = frozenset({"tmpfs", "ramfs"})
_DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
OnDurable = Callable[[Sequence[PieceDone]], None]
"""Told what has become durable, on the thread that waited for the disk."""


class OutputFile:
    """One file of known size, open for positioned writes."""

    def __init__(
        self,
        path: Path,
        nbytes: int,
        *,
        resumed: bool = False,
        shared: bool = False,
        on_open: Callable[[], None] = lambda: None,
        on_durable: OnDurable = lambda _: None,
    ) -> None:
        """Create the file and reserve its disk space, or go on with one of an earlier run.

        Args:
            path: Where; nothing may be there, unless the work is resumed.
            nbytes: Final size.
            resumed: Whether the file may be there, with parts of its bytes.
            shared: Whether other processes may write to it now. Room is not reserved then: where a file
                system cannot do that, the C library writes zeros over what it reads as zeros, and the
                others' bytes may come in between.
            on_open: Called before anything of the file is changed; what it raises closes the file.
            on_durable: Told which pieces have become durable.

        Raises:
            DiskSpaceError: The disk has no room for it.
            OutputError: The system refuses, or another file is linked there.
        """
        self._path = path
        self._nbytes = nbytes
        self._lock = threading.Lock()
        self._unsynced = 0
        self._written: list[PieceDone] = []
        self._on_durable = on_durable
        self._shared = shared
        exclusive = 0 if resumed else os.O_EXCL
        try:
            self._fd = open_own(path, os.O_RDWR | os.O_CREAT | exclusive)
        except OSError as error:
            raise name_limit(error) or OutputError(
                f"{path}: cannot be created: {error.strerror}"
            ) from error
        try:
            on_open()
            self._preallocate()
        except StreamMergeError:
            os.close(self._fd)
            raise
        except OSError as error:
            os.close(self._fd)
            raise _write_error(path, 0, nbytes, error) from error

    @property
    def path(self) -> Path:
        """The file."""
        return self._path

    def write_at(
        self,
        offset: int,
        buffer: memoryview,
        pieces: Sequence[PieceDone] = (),
        *,
        runs: Runs | None = None,
        begin: int = 0,
    ) -> None:
        """Write all of ``buffer`` at ``offset``; now and then, wait until the disk has caught up.

        Args:
            offset: First byte in the file.
            buffer: The bytes.
            pieces: What these bytes are; told to ``on_durable`` once they are on the disk.
            runs: How they lie in the file; None for side by side.
            begin: With runs, the first byte in the range that lies in them from ``offset`` on.

        Raises:
            DiskSpaceError: The disk is full.
            OutputError: The system refuses.
        """
        done = at = 0
        spans = ((0, 0, len(buffer)),) if runs is None else runs.spans(begin, len(buffer))
        try:
            for place, first, end in spans:
                done, at = first, offset + place
                while done < end:
                    count = self._write_some(at, buffer[done:end])
                    done, at = done + count, at + count
            with self._lock:
                self._written.extend(pieces)
                self._unsynced += len(buffer)
                due = self._unsynced >= SYNC_BYTES
                if due:
                    self._unsynced = 0
            if due:
                self.sync()
        except OSError as error:
            raise _write_error(self._path, at, len(buffer) - done, error) from error

    def read_into(self, offset: int, buffer: memoryview) -> bool:
        """Fill ``buffer`` with what an earlier run wrote at ``offset``; return whether there is so much.

        Raises:
            OutputError: The system refuses.
        """
        done = 0
        try:
            while done < len(buffer):
                count = self._read_some(offset + done, buffer[done:])
                if not count:
                    return False
                done += count
        except OSError as error:
            raise OutputError(
                f"{self._path}: reading byte {offset + done} failed: {error.strerror}"
            ) from error
        return True

    def forget_cached(self) -> None:
        """Tell the system that what was read will not be read again; it may know no such advice."""
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):
                os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Make everything durable and close.

        Raises:
            OutputError: The system could not write what it had accepted.
        """
        try:
            self.sync()
        except OSError as error:
            raise _write_error(self._path, 0, self._nbytes, error) from error
        finally:
            os.close(self._fd)

    def abandon(self) -> None:
        """Make durable what can be, and close; the merge has failed already."""
        with contextlib.suppress(OSError, OutputError, DiskSpaceError):
            self.sync()
        with contextlib.suppress(OSError):
            os.close(self._fd)

    def sync(self) -> None:
        """Wait until everything written so far is on the disk, and tell what that is.

        Raises:
            OSError: The system could not write what it had accepted; nothing is told.
        """
        with self._lock:
            # What is written from here on may miss this sync, and waits for the next one.
            written, self._written = self._written, []
        self._sync()
        self._on_durable(written)

    def _preallocate(self) -> None:
        if os.fstat(self._fd).st_size > self._nbytes:
            # Something was added to what an earlier run left.
            os.ftruncate(self._fd, self._nbytes)
        reserve = hasattr(os, "posix_fallocate") and self._nbytes > 0 and not self._shared
        if reserve and not lies_in_memory(self._fd):
            try:
                os.posix_fallocate(self._fd, 0, self._nbytes)
            except OSError as error:
                # Some file systems cannot reserve; they get a sparse file.
                if error.errno not in {errno.EOPNOTSUPP, errno.EINVAL}:
                    raise
            else:
                return
        os.ftruncate(self._fd, self._nbytes)

    def _write_some(self, offset: int, buffer: memoryview) -> int:
        if hasattr(os, "pwrite"):
            return os.pwrite(self._fd, buffer, offset)
        with self._lock:
            os.lseek(self._fd, offset, os.SEEK_SET)
            return os.write(self._fd, buffer)

    def _read_some(self, offset: int, buffer: memoryview) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._fd, [buffer], offset)
        with self._lock:
            os.lseek(self._fd, offset, os.SEEK_SET)
            part = os.read(self._fd, len(buffer))
        buffer[: len(part)] = part
        return len(part)

    def _sync(self) -> None:
        getattr(os, "fdatasync", os.fsync)(self._fd)
        if hasattr(os, "posix_fadvise"):
            # Only clean pages can be dropped, hence after the sync.
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)


def lies_in_memory(descriptor: int) -> bool:
    """Return whether a file lies in memory, as in tmpfs, where to reserve room is to fill it with zeros.

    That takes as long as writing does, and on one core; what was free a moment ago is reserved while it is
    written there.
    """
    device = os.fstat(descriptor).st_dev
    where = f" {os.major(device)}:{os.minor(device)} "
    try:
        mounts = _MOUNTS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    # "36 35 98:0 / /mnt rw,noatime - tmpfs tmpfs rw"
    kinds = (line.partition(" - ")[2].split(" ")[0] for line in mounts if where in line)
    return any(kind in _IN_MEMORY for kind in kinds)


def sync_directory(path: Path) -> None:
    """Make renames and new names in a directory durable, where the system can."""
    if os.name != "posix":
        return
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_durably(path: Path, pieces: Iterable[bytes], *, alone: bool = True) -> None:
    """Write a file from front to back, wait until it is on the disk, and give it its name.

    Whatever had the name before is replaced, not written to: it may be a link to another file.

    Args:
        path: The file.
        pieces: What it holds.
        alone: Whether no other process writes files to the directory.

    Raises:
        DiskSpaceError: The disk is full.
        OutputError: The system refuses.
    """
    written = 0
    new = path.with_name(NEW_NAME if alone else f"{path.name}.new")
    try:
        with os.fdopen(create_own(new), "wb") as stream:
            for piece in pieces:
                stream.write(piece)
                written += len(piece)
            stream.flush()
            os.fsync(stream.fileno())
        new.replace(path)
    except OSError as error:
        if error.errno in _DISK_FULL:
            raise _write_error(path, written, 0, error) from error
        raise name_limit(error) or OutputError(
            f"{path}: cannot be written: {error.strerror}"
        ) from error


def _write_error(
    path: Path, offset: int, nbytes: int, error: OSError
) -> OutputError | DiskSpaceError:
    if error.errno in _DISK_FULL:
        return DiskSpaceError(
            f"{path}: the disk is full: {format_size(nbytes)} at byte {offset} found no room; "
            "free some space, then continue with --resume"
        )
    return OutputError(f"{path}: writing at byte {offset} failed: {error.strerror}")
