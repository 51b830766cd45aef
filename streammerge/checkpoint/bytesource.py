"""Bytes of input files, positioned reads into caller's memory, from any number of threads.

Two implementations behind one interface, same bytes: :class:`PreadSource` copies from the page
cache through the kernel, :class:`MmapSource` from a mapping. Where ``preadv`` is missing,
:class:`SeekSource` does the same behind a lock. Each drops pages that will not be needed again.

A page of a mapping that is behind the end of its file, because the file was made shorter meanwhile,
ends the process with SIGBUS, and looking at the size first only makes that rarer. So the compiled
kernels copy under a handler of that signal; without them, files are never mapped but read.

Memory: none of the sources allocates; a mapping keeps at most 1 MiB of pages per reading thread.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self

import numpy as np

from streammerge.checkpoint.types import ShardFile
from streammerge.errors import CheckpointError, TruncatedShardError
from streammerge.limits import name_limit
from streammerge.native.library import load_kernels
from streammerge.storage.copies import find_object
from streammerge.storage.objects import RemoteObject
from streammerge.storage.retrying import persist
from streammerge.storage.stores import LARGEST_RANGE, open_store
from streammerge.units import MIB

_MMAP_STEP = 1 * MIB
"""Bytes copied from a mapping before its pages are given back; they count as the process's own."""


DROP_BYTES = 32 * MIB
"""Bytes of a file that are read before the system is told to forget them."""


Range = tuple[int, int]
"""The first byte, and the one behind the last."""


class ByteSourceKind(StrEnum):
    """Which implementation reads."""

    PREAD = "pread"
    """Positioned reads; the measured faster one, and the default."""
    MMAP = "mmap"
    """Memory mapping; where there are no compiled kernels to guard it, reads instead."""

    @property
    def open_files(self) -> int:
        """Files that the process has open for each input: a mapping has one of its own."""
        return 2 if self is ByteSourceKind.MMAP else 1


class ByteSource(ABC):
    """One open input file."""

    kind: ClassVar[ByteSourceKind] = ByteSourceKind.PREAD
    """How it really reads."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._dropping = threading.Lock()
        self._read_out: list[Range] = []
        self._read_out_nbytes = 0
        self._free_for_all: Callable[[list[Range]], list[Range]] | None = None
        try:
            self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except OSError as error:
            raise name_limit(error) or CheckpointError(
                f"{path}: cannot be opened: {error.strerror}"
            ) from error
        self._opened = os.fstat(self._fd)

    @property
    def path(self) -> Path:
        """The file."""
        return self._path

    def fingerprint(self) -> tuple[int, int]:
        """Return the size in bytes and the modification time in nanoseconds, as they are now."""
        status = os.fstat(self._fd)
        return status.st_size, status.st_mtime_ns

    def was_rewritten(self) -> bool:
        """Return whether the file may have been written to since it was opened, whatever its times say.

        Who writes and then sets the old time of modification cannot set the time at which the system
        last changed the file's record. New links, rights and owners change that too, as tools do that
        link snapshots of a cache; where one of them differs, it explains the change. Nothing else
        does: then what was read may be of two versions, and there is no telling without reading all
        again.
        """
        now = os.fstat(self._fd)
        return now.st_ctime_ns != self._opened.st_ctime_ns and all(
            getattr(now, name) == getattr(self._opened, name)
            for name in ("st_nlink", "st_mode", "st_uid", "st_gid")
        )

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

    def share(self, free_for_all: Callable[[list[Range]], list[Range]]) -> None:
        """Let others read the file from the page cache too.

        Args:
            free_for_all: Told what this one will not read again; returns what no other will either.
        """
        self._free_for_all = free_for_all

    def _forget_cached(self, ranges: list[Range]) -> None:
        if not hasattr(os, "posix_fadvise"):
            return
        if self._free_for_all is not None:
            ranges = self._free_for_all(_joined(ranges))
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
    """Copies from a mapping of the whole file, which may become shorter meanwhile.

    It needs the compiled kernels: :func:`choose_byte_source` knows whether they are there.
    """

    kind = ByteSourceKind.MMAP

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._nbytes = self._opened.st_size
        self._address = 0
        with ExitStack() as stack:
            stack.callback(super().close)
            kernels = load_kernels()
            if kernels is None:
                raise CheckpointError(f"{path}: is not mapped without compiled kernels; use pread")
            self._copy = kernels.copy_mapped
            stack.enter_context(kernels.guard_mappings())
            self._map = stack.enter_context(self._mapping()) if self._nbytes else None
            if self._map is not None:
                # The array is gone at once, for a mapping cannot be closed while others view it.
                self._address = np.frombuffer(self._map, dtype=np.uint8).ctypes.data
            self._held = stack.pop_all()

    def _mapping(self) -> mmap.mmap:
        try:
            mapping = mmap.mmap(self._fd, self._nbytes, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            # A ValueError says that the file has become shorter.
            raise name_limit(error) or CheckpointError(
                f"{self._path}: cannot be mapped: {error}"
            ) from error
        if hasattr(mmap, "MADV_SEQUENTIAL"):
            mapping.madvise(mmap.MADV_SEQUENTIAL)
        return mapping

    def _read_some(self, offset: int, buffer: memoryview) -> int:
        count = min(len(buffer), self._nbytes - offset, _MMAP_STEP)
        if count <= 0:
            return 0
        into = np.frombuffer(buffer, dtype=np.uint8, count=count)
        copied = self._copy(into.ctypes.data, self._address + offset, count)
        self._forget(offset, count)
        # Asked after the copy: behind the end of a file, its last page reads as zeros.
        there = os.fstat(self._fd).st_size - offset
        if copied == 0 and there > 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return max(0, min(copied, there))

    def _forget(self, offset: int, nbytes: int) -> None:
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            begin = offset // mmap.PAGESIZE * mmap.PAGESIZE
            self._map.madvise(mmap.MADV_DONTNEED, begin, offset + nbytes - begin)

    def close(self) -> None:
        """Close mapping and file."""
        self._held.close()


class MemorySource(ByteSource):
    """A file that is nowhere but in memory."""

    def __init__(self, path: Path, content: bytes) -> None:
        """Take what it holds."""
        self._path = path
        self._content = memoryview(content)

    def fingerprint(self) -> tuple[int, int]:
        """Return the size; there was no modification."""
        return len(self._content), 0

    def was_rewritten(self) -> bool:
        """Nobody can."""
        return False

    def _read_some(self, offset: int, buffer: memoryview) -> int:
        part = self._content[offset : offset + len(buffer)]
        buffer[: len(part)] = part
        return len(part)

    def drop(self, offset: int, nbytes: int) -> None:
        """Keep it: there is no other place to read it from."""

    def close(self) -> None:
        """Do nothing."""


class RemoteSource(ByteSource):
    """One object of a store, read by ranges."""

    def __init__(self, what: RemoteObject) -> None:
        """Read one version of an object."""
        self._path = Path(what.url)
        self._what = what
        self._store = open_store(what.url)

    def fingerprint(self) -> tuple[int, int]:
        """Return the size; every read says which version it wants."""
        return self._what.nbytes, 0

    def was_rewritten(self) -> bool:
        """What was read is of one version."""
        return False

    def _read_some(self, offset: int, buffer: memoryview) -> int:
        count = min(len(buffer), LARGEST_RANGE, self._what.nbytes - offset)
        if count <= 0:
            return 0
        part = buffer[:count]
        persist(self._what.url, lambda: self._store.read_into(self._what, offset, part))
        return count

    def drop(self, offset: int, nbytes: int) -> None:
        """Nothing of it is cached here."""

    def close(self) -> None:
        """Connections belong to the store."""


def check_unchanged(files: Sequence[ShardFile], sources: Sequence[ByteSource]) -> None:
    """Return if every open file is still what it was when its header was read.

    Since then, its size and time of modification must be the same. Not the time of the record: of what
    has changed between planning and opening nothing but headers had been read, and files in a cache get
    links at any time. Since it was opened, nothing may have been written to it.

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
        if source.was_rewritten():
            raise CheckpointError(
                f"{file.path}: changed while it was read: it has its size of {nbytes} bytes and its "
                "modification time, but the system changed its record since, as writing does and "
                "setting the time back; what was merged may be of two versions, merge again"
            )


def _joined(ranges: list[Range]) -> list[Range]:
    """Return ranges of bytes in order, neighbours made one."""
    joined: list[Range] = []
    for begin, end in sorted(ranges):
        if joined and begin <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((begin, end))
    return joined


OpenByteSource = Callable[[Path], ByteSource]
"""Opens a file for reading; the seam for other kinds of storage, and for fakes."""


def choose_byte_source(kind: ByteSourceKind) -> OpenByteSource:
    """Return what opens a file in this way on this system, and an object of a store in its own."""
    open_file = choose_file_source(kind)

    def open_source(path: Path) -> ByteSource:
        what = find_object(path)
        return open_file(path) if what is None else RemoteSource(what)

    return open_source


def choose_file_source(kind: ByteSourceKind) -> type[ByteSource]:
    """Return the implementation for files on a disk in this way on this system."""
    if kind is ByteSourceKind.MMAP and load_kernels() is not None:
        return MmapSource
    return PreadSource if hasattr(os, "preadv") else SeekSource
