"""Bytes of input files, positioned reads into caller's memory, from any number of threads.

Two implementations behind one interface, same bytes: :class:`PreadSource` copies from the page
cache through the kernel, :class:`MmapSource` from a mapping. Where ``preadv`` is missing,
:class:`SeekSource` does the same behind a lock. Each drops pages that will not be needed again.

Memory: none of the sources allocates; a mapping keeps at most 1 MiB of pages per reading thread.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from streammerge.checkpoint.types import ShardFile
from streammerge.errors import CheckpointError, TruncatedShardError
from streammerge.limits import name_limit
from streammerge.units import MIB

_MMAP_STEP = 1 * MIB
"""Bytes copied from a mapping before its pages are given back; they count as the process's own."""


DROP_BYTES = 32 * MIB
"""Bytes of a file that are read before the system is told to forget them."""


class ByteSourceKind(StrEnum):
    """Which implementation reads."""

    PREAD = "pread"
    """Positioned reads; the measured faster one, and the default."""
    MMAP = "mmap"
    """Memory mapping."""


class ByteSource(ABC):
    """One open input file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._dropping = threading.Lock()
        self._read_out: list[tuple[int, int]] = []
        self._read_out_nbytes = 0
        try:
            self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except OSError as error:
            raise name_limit(error) or CheckpointError(
                f"{path}: cannot be opened: {error.strerror}"
            ) from error

    @property
    def path(self) -> Path:
        """The file."""
        return self._path

    def fingerprint(self) -> tuple[int, int]:
        """Return the size in bytes and the modification time in nanoseconds, as they are now."""
        status = os.fstat(self._fd)
        return status.st_size, status.st_mtime_ns

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with the bytes from ``offset`` on.

        Raises:
            TruncatedShardError: The file ends before the buffer is full.
            CheckpointError: The system refuses to read.
        """
        done = 0
        while done < len(buffer):
            try:
                count = self._read_some(offset + done, buffer[done:])
            except OSError as error:
                raise CheckpointError(
                    f"{self._path}: reading byte {offset + done} failed: {error.strerror}"
                ) from error
            if count == 0:
                raise TruncatedShardError(
                    f"{self._path}: ends at byte {offset + done}, but its header declares data up "
                    f"to byte {offset + len(buffer)} and beyond; it changed while it was read"
                )
            done += count

    @abstractmethod
    def _read_some(self, offset: int, buffer: memoryview) -> int:
        """Read at least one byte, at most the buffer; return 0 only at the end of the file."""

    def drop(self, offset: int, nbytes: int) -> None:
        """Tell the system that these bytes will not be read again.

        It is told about many at once: each call makes it look at what all cores have in hand.
        """
        with self._dropping:
            self._read_out.append((offset, offset + nbytes))
            self._read_out_nbytes += nbytes
            if self._read_out_nbytes < DROP_BYTES:
                return
            ranges, self._read_out, self._read_out_nbytes = self._read_out, [], 0
        self._forget_cached(ranges)

    def _forget_cached(self, ranges: list[tuple[int, int]]) -> None:
        if not hasattr(os, "posix_fadvise"):
            return
        # It is advice: a system that cannot take it loses nothing.
        with contextlib.suppress(OSError):
            for begin, end in _joined(ranges):
                os.posix_fadvise(self._fd, begin, end - begin, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Close the file."""
        self._forget_cached(self._read_out)
        os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class PreadSource(ByteSource):
    """Reads with ``preadv``, which needs no lock and lets other threads run."""

    def _read_some(self, offset: int, buffer: memoryview) -> int:
        # One call returns at most 2,147,479,552 bytes on Linux; the caller loops.
        return os.preadv(self._fd, [buffer], offset)


class SeekSource(ByteSource):
    """Reads with seek and readinto, one thread at a time, where ``preadv`` is missing."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._lock = threading.Lock()
        self._stream = os.fdopen(self._fd, "rb", buffering=0, closefd=False)

    def _read_some(self, offset: int, buffer: memoryview) -> int:
        with self._lock:
            self._stream.seek(offset)
            return self._stream.readinto(buffer) or 0


class MmapSource(ByteSource):
    """Copies from a mapping of the whole file."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._nbytes = os.fstat(self._fd).st_size
        self._map = mmap.mmap(self._fd, 0, access=mmap.ACCESS_READ) if self._nbytes else None
        if self._map is not None and hasattr(mmap, "MADV_SEQUENTIAL"):
            self._map.madvise(mmap.MADV_SEQUENTIAL)

    def _read_some(self, offset: int, buffer: memoryview) -> int:
        count = min(len(buffer), self._nbytes - offset, _MMAP_STEP)
        if count <= 0 or self._map is None:
            return 0
        # numpy copies without holding the interpreter lock; a memoryview assignment would not.
        np.copyto(
            np.frombuffer(buffer, dtype=np.uint8, count=count),
            np.frombuffer(self._map, dtype=np.uint8, count=count, offset=offset),
        )
        self._forget(offset, count)
        return count

    def _forget(self, offset: int, nbytes: int) -> None:
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            begin = offset // mmap.PAGESIZE * mmap.PAGESIZE
            self._map.madvise(mmap.MADV_DONTNEED, begin, offset + nbytes - begin)

    def close(self) -> None:
        """Close mapping and file."""
        if self._map is not None:
            self._map.close()
        super().close()


def check_unchanged(files: Sequence[ShardFile], sources: Sequence[ByteSource]) -> None:
    """Return if every open file is still what it was when its header was read.

    Raises:
        CheckpointError: One of them has changed.
    """
    for file, source in zip(files, sources, strict=True):
        nbytes, mtime_ns = source.fingerprint()
        if (nbytes, mtime_ns) != (file.nbytes, file.mtime_ns):
            raise CheckpointError(
                f"{file.path}: changed since it was planned: {file.nbytes} bytes then, {nbytes} "
                "now, or another modification time; plan again"
            )


def _joined(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return ranges of bytes in order, neighbours made one."""
    joined: list[tuple[int, int]] = []
    for begin, end in sorted(ranges):
        if joined and begin <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((begin, end))
    return joined


OpenByteSource = Callable[[Path], ByteSource]
"""Opens a file for reading; the seam for other kinds of storage, and for fakes."""


def choose_byte_source(kind: ByteSourceKind) -> OpenByteSource:
    """Return the implementation for this kind on this system."""
    if kind is ByteSourceKind.MMAP:
        return MmapSource
    return PreadSource if hasattr(os, "preadv") else SeekSource
