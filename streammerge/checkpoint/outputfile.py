"""Output files: preallocated, written at any position from any thread, synced as they grow.

Memory: nothing is buffered here. The system holds at most :data:`SYNC_BYTES` of unwritten pages
per writing thread and file, because whoever crosses that mark waits for the disk.
"""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

from streammerge.errors import DiskSpaceError, OutputError
from streammerge.units import MIB, format_size

SYNC_BYTES = 64 * MIB
"""Written bytes between two syncs of a file. Smaller windows cost disk round trips; larger ones let
dirty pages pile up, which stalls small machines and counts against a memory cgroup."""


class OutputFile:
    """One file of known size, open for positioned writes."""

    def __init__(self, path: Path, nbytes: int) -> None:
        """Create the file and reserve its disk space.

        Args:
            path: Where; nothing may be there.
            nbytes: Final size.

        Raises:
            DiskSpaceError: The disk has no room for it.
            OutputError: The system refuses.
        """
        self._path = path
        self._nbytes = nbytes
        self._lock = threading.Lock()
        self._unsynced = 0
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        try:
            self._fd = os.open(path, flags, 0o666)
        except OSError as error:
            raise OutputError(f"{path}: cannot be created: {error.strerror}") from error
        try:
            self._preallocate()
        except OSError as error:
            os.close(self._fd)
            raise _write_error(path, 0, nbytes, error) from error

    @property
    def path(self) -> Path:
        """The file."""
        return self._path

    def write_at(self, offset: int, buffer: memoryview) -> None:
        """Write all of ``buffer`` at ``offset``; now and then, wait until the disk has caught up.

        Raises:
            DiskSpaceError: The disk is full.
            OutputError: The system refuses.
        """
        done = 0
        try:
            while done < len(buffer):
                done += self._write_some(offset + done, buffer[done:])
            with self._lock:
                self._unsynced += len(buffer)
                due = self._unsynced >= SYNC_BYTES
                if due:
                    self._unsynced = 0
            if due:
                self._sync()
        except OSError as error:
            raise _write_error(self._path, offset + done, len(buffer) - done, error) from error

    def close(self) -> None:
        """Make everything durable and close.

        Raises:
            OutputError: The system could not write what it had accepted.
        """
        try:
            self._sync()
        except OSError as error:
            raise _write_error(self._path, 0, self._nbytes, error) from error
        finally:
            os.close(self._fd)

    def abandon(self) -> None:
        """Close without waiting for the disk."""
        os.close(self._fd)

    def _preallocate(self) -> None:
        if hasattr(os, "posix_fallocate") and self._nbytes:
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

    def _sync(self) -> None:
        getattr(os, "fdatasync", os.fsync)(self._fd)
        if hasattr(os, "posix_fadvise"):
            # Only clean pages can be dropped, hence after the sync.
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)


def sync_directory(path: Path) -> None:
    """Make renames and new names in a directory durable, where the system can."""
    if os.name != "posix":
        return
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _write_error(
    path: Path, offset: int, nbytes: int, error: OSError
) -> OutputError | DiskSpaceError:
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return DiskSpaceError(
            f"{path}: the disk is full: {format_size(nbytes)} at byte {offset} found no room; "
            "free some space and run the merge again"
        )
    return OutputError(f"{path}: writing at byte {offset} failed: {error.strerror}")
