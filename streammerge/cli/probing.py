"""How fast a disk is, by a moment of reading and writing on it.

A few requests side by side, as a merge makes them. Files are read past what the system has of them in
memory, and what is written is waited for. Memory: :data:`_THREADS` requests of 8 MiB; of a store eight.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from streammerge.checkpoint.bytesource import RemoteSource
from streammerge.checkpoint.types import ShardFile
from streammerge.errors import OutputError
from streammerge.storage.objects import RemoteObject
from streammerge.units import MIB, format_size

_REQUEST = 8 * MIB
"""As large as the requests of a merge."""
_MOST = 64 * MIB
"""Bytes that a probe moves: a tenth of a second on a common disk."""
_SECONDS = 1.0
"""After which a slow disk is known well enough."""
_THREADS = 4
"""Requests at once; a merge has as many."""


@dataclass(frozen=True, slots=True)
class Rate:
    """What a probe has seen."""

    nbytes: int
    """Bytes moved."""
    seconds: float
    """What that took; above 0."""

    @property
    def per_second(self) -> float:
        """Return bytes per second."""
        return self.nbytes / self.seconds


@dataclass(frozen=True, slots=True)
class Estimate:
    """What the disk alone takes of a merge's time; reading and writing overlap."""

    seconds: float
    """The longer of reading and writing."""
    read: Rate | None
    """By which reading was reckoned; None without a file to read."""
    written: Rate
    """By which writing was."""
    from_store: bool = False
    """Whether what was read from is a store."""

    def __str__(self) -> str:
        """Return the estimate for people."""
        who = "the disk"
        reads = "" if self.read is None else f"reads {format_size(int(self.read.per_second))}/s, "
        if self.read is not None and self.from_store:
            who, reads = "the store", reads.replace("reads", "gives") + "the disk "
        return (
            f"at least {self.seconds:.1f} s: {who} {reads}writes "
            f"{format_size(int(self.written.per_second))}/s, by a short probe"
        )

    def as_event(self) -> dict[str, object]:
        """Return the estimate for scripts."""
        return {
            "event": "estimate",
            "seconds": self.seconds,
            "read_per_second": None if self.read is None else self.read.per_second,
            "write_per_second": self.written.per_second,
        }


def estimate_seconds(
    files: Iterable[ShardFile], *, bytes_to_read: int, bytes_to_write: int, directory: Path
) -> Estimate:
    """Return how long the disk, or the store of the inputs, will take for a merge.

    Args:
        files: The inputs; the largest one is read from.
        bytes_to_read: By the plan.
        bytes_to_write: By the plan.
        directory: On the disk of the output.

    Raises:
        OutputError: The directory cannot be written in.
        CheckpointError: The store does not give what it should.
    """
    # What an earlier recipe makes is not there yet.
    there = [file for file in files if file.remote is not None or file.path.is_file()]
    largest = max(there, key=lambda file: file.nbytes, default=None)
    read = None
    if largest is not None:
        what = largest.remote
        read = probe_reading(largest.path) if what is None else probe_store(what)
    written = probe_writing(directory)
    reading = 0.0 if read is None else bytes_to_read / read.per_second
    return Estimate(
        max(reading, bytes_to_write / written.per_second),
        read,
        written,
        from_store=largest is not None and largest.remote is not None,
    )


def probe_store(what: RemoteObject) -> Rate:
    """Return how fast an object comes, by at most 64 MiB of its middle, as many requests at once as a merge makes.

    Raises:
        CheckpointError: The store does not give it.
    """
    source = RemoteSource(what)
    nbytes = min(what.nbytes, _MOST)
    begin = (what.nbytes - nbytes) // 2

    def read(at: int, count: int) -> int:
        source.read_into(begin + at, memoryview(bytearray(count)))
        return count

    return _time(nbytes, read, threads=_MOST // _REQUEST)


def probe_reading(path: Path) -> Rate:
    """Return how fast a file is read from its disk, by at most 64 MiB of its middle."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    try:
        size = os.fstat(descriptor).st_size
        nbytes = min(size, _MOST)
        begin = (size - nbytes) // 2
        _forget(descriptor, begin, nbytes)
        return _time(nbytes, lambda at, count: _read(path, begin + at, count))
    finally:
        os.close(descriptor)


def probe_writing(directory: Path) -> Rate:
    """Return how fast a disk takes new files, by one of at most 64 MiB that is gone afterwards.

    Raises:
        OutputError: The directory cannot be written in.
    """
    # Not zeros: file systems may leave those out, or store them small.
    request = os.urandom(_REQUEST)
    try:
        with tempfile.TemporaryFile(dir=directory, prefix="streammerge-probe-") as stream:
            begin = perf_counter()
            nbytes = 0
            while nbytes < _MOST and perf_counter() - begin < _SECONDS:
                nbytes += stream.write(request)
            stream.flush()
            os.fsync(stream.fileno())
            return Rate(nbytes, max(perf_counter() - begin, 1e-9))
    except OSError as error:
        raise OutputError(
            f"{directory}: cannot be written in to see how fast its disk is: {error.strerror}; name another "
            "directory, or leave the probe out"
        ) from error


def probe_directory(directory: Path) -> tuple[Rate, Rate]:
    """Return how fast files in a directory are read and written, by one that is gone afterwards.

    Raises:
        OutputError: The directory cannot be written in.
    """
    written = probe_writing(directory)
    try:
        with tempfile.NamedTemporaryFile(dir=directory, prefix="streammerge-probe-") as stream:
            for _ in range(max(1, written.nbytes // _REQUEST)):
                stream.write(os.urandom(_REQUEST))
            stream.flush()
            os.fsync(stream.fileno())
            return probe_reading(Path(stream.name)), written
    except OSError as error:
        raise OutputError(
            f"{directory}: cannot be read to see how fast its disk is: {error.strerror}"
        ) from error


def _time(nbytes: int, move: Callable[[int, int], int], threads: int = _THREADS) -> Rate:
    """Return what moving so many bytes takes, by requests side by side; fewer if it takes long."""
    begin = perf_counter()

    def move_in_time(at: int) -> int:
        if perf_counter() - begin > _SECONDS:
            return 0
        return move(at, min(_REQUEST, nbytes - at))

    with ThreadPoolExecutor(threads) as pool:
        moved = sum(pool.map(move_in_time, range(0, nbytes, _REQUEST)))
    # An empty file has no rate; one byte in the time that it took is as good as any.
    return Rate(max(moved, 1), max(perf_counter() - begin, 1e-9))


def _read(path: Path, offset: int, nbytes: int) -> int:
    with path.open("rb", buffering=0) as stream:
        stream.seek(offset)
        return len(stream.read(nbytes))


def _forget(descriptor: int, offset: int, nbytes: int) -> None:
    """Ask the system to let go of what it has of a file in memory; where it cannot, the rate is higher."""
    with contextlib.suppress(AttributeError, OSError):
        os.posix_fadvise(descriptor, offset, nbytes, os.POSIX_FADV_DONTNEED)
