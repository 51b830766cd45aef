"""The raw I/O floor: reads all inputs and writes as many bytes as a merge would, computing nothing.

    python -m benchmarks.floor OUT --read FILE... [--read FILE...] --write-nbytes N --files F --sweeps S

Four threads read 8 MiB at a time with ``preadv``, of one model after the other as a merge does, and
drop what they have read: one model at a time would be slower by a fifth. One thread writes
preallocated files, and another one syncs and drops them every 64 MiB, so that writing never waits
for a sync that has only begun. Writing starts with the last sweep of reading, as it must in a merge
that needs a statistic of the whole model; earlier sweeps leave their pages in the cache.

Memory: 5 buffers of 8 MiB, and pages not yet written.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, zip_longest
from mmap import mmap
from pathlib import Path
from threading import Lock

_Request = tuple[int, int, int]
"""File descriptor, offset and bytes."""

READERS = 4
REQUEST_NBYTES = 8 * 2**20
"""Four requests of this size keep common disks busy; larger ones change nothing measurable."""
SYNC_NBYTES = 64 * 2**20
"""Bytes between two syncs: waiting for all at the end would leave the disk idle before."""


@dataclass(frozen=True, slots=True)
class Floor:
    """What the reads and writes took."""

    seconds: float
    """All of it, reading and writing at the same time."""
    read_seconds: float
    """Until the last reader was done."""
    write_seconds: float
    """From the start of writing until everything was synced."""
    read_nbytes: int
    """Bytes read, over all sweeps."""
    written_nbytes: int
    """Bytes written."""


def run_floor(
    models: Sequence[Sequence[Path]],
    out: Path,
    *,
    write_nbytes: int,
    files: int,
    sweeps: int,
    reserve: bool = True,
) -> Floor:
    """Read all inputs, write a directory of as many bytes as asked for, and say what it took.

    Args:
        models: Files to read, of each model.
        out: Directory to make.
        write_nbytes: Bytes to write.
        files: Number of files they are spread over.
        sweeps: How often every input is read.
        reserve: Whether room for the files is reserved before they are written, which in tmpfs takes as
            long as writing.
    """
    out.mkdir()
    started = time.perf_counter()
    read_nbytes = 0
    for _ in range(sweeps - 1):
        read_nbytes += _read_all(models, drop=False)
    write_started = time.perf_counter()
    with ThreadPoolExecutor(1) as pool:
        writing: Future[float] = pool.submit(
            partial(_write_all, out, write_nbytes, files, reserve=reserve)
        )
        read_nbytes += _read_all(models, drop=True)
        read_ended = time.perf_counter()
        write_ended = writing.result()
    return Floor(
        seconds=time.perf_counter() - started,
        read_seconds=read_ended - started,
        write_seconds=write_ended - write_started,
        read_nbytes=read_nbytes,
        written_nbytes=write_nbytes,
    )


def _read_all(models: Sequence[Sequence[Path]], *, drop: bool) -> int:
    """Read every file once, in parallel, and return the number of bytes."""
    opened = [[os.open(path, os.O_RDONLY) for path in files] for files in models]
    requests = _in_turn([_iter_requests(descriptors) for descriptors in opened])
    lock = Lock()

    def read_until_done() -> int:
        buffer = memoryview(mmap(-1, REQUEST_NBYTES))
        total = 0
        while True:
            with lock:
                request = next(requests, None)
            if request is None:
                return total
            descriptor, offset, nbytes = request
            done = 0
            while done < nbytes:
                count = os.preadv(descriptor, [buffer[: nbytes - done]], offset + done)
                if count == 0:
                    raise EOFError(f"an input ended at byte {offset + done} while it was read")
                done += count
            if drop:
                os.posix_fadvise(descriptor, offset, nbytes, os.POSIX_FADV_DONTNEED)
            total += nbytes

    try:
        with ThreadPoolExecutor(READERS) as pool:
            readers = [pool.submit(read_until_done) for _ in range(READERS)]
            return sum(reader.result() for reader in readers)
    finally:
        for descriptor in chain.from_iterable(opened):
            os.close(descriptor)


def _in_turn(models: Sequence[Iterator[_Request]]) -> Iterator[_Request]:
    """Yield a request of every model, then the next one of every model, until all are through."""
    for requests in zip_longest(*models):
        yield from (request for request in requests if request is not None)


def _iter_requests(descriptors: Sequence[int]) -> Iterator[_Request]:
    """Yield (descriptor, offset, bytes) for every part of every file, in file order."""
    for descriptor in descriptors:
        size = os.fstat(descriptor).st_size
        for offset in range(0, size, REQUEST_NBYTES):
            yield descriptor, offset, min(REQUEST_NBYTES, size - offset)


def _write_all(out: Path, nbytes: int, files: int, *, reserve: bool) -> float:
    """Write files of noise, make them durable, and return when that was."""
    buffer = memoryview(mmap(-1, REQUEST_NBYTES))
    # Not zeros: some disks and their hosts do not store those.
    buffer[:] = os.urandom(REQUEST_NBYTES)
    with ThreadPoolExecutor(1) as pool:
        # One window may be on its way to the disk while the next one is written.
        syncing = pool.submit(lambda: None)
        for number in range(files):
            file_nbytes = nbytes * (number + 1) // files - nbytes * number // files
            path = out / f"floor-{number}.bin"
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            if file_nbytes and reserve:
                os.posix_fallocate(descriptor, 0, file_nbytes)
            offset = unsynced = 0
            while offset < file_nbytes:
                count = os.pwrite(descriptor, buffer[: file_nbytes - offset], offset)
                offset += count
                unsynced += count
                if unsynced >= SYNC_NBYTES:
                    syncing.result()
                    syncing = pool.submit(_sync_window, descriptor)
                    unsynced = 0
            syncing.result()
            syncing = pool.submit(_finish_file, descriptor)
        syncing.result()
    return time.perf_counter()


def _sync_window(descriptor: int) -> None:
    os.fdatasync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def _finish_file(descriptor: int) -> None:
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def main(arguments: Sequence[str]) -> int:
    """Run the floor that the command line asks for and print what it took, as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--read", type=Path, nargs="*", action="append", default=[])
    parser.add_argument("--write-nbytes", type=int, default=0)
    parser.add_argument("--files", type=int, default=1)
    parser.add_argument("--sweeps", type=int, default=1)
    parser.add_argument("--no-reserve", dest="reserve", action="store_false")
    options = parser.parse_args(arguments)
    floor = run_floor(
        options.read,
        options.out,
        write_nbytes=options.write_nbytes,
        files=options.files,
        sweeps=options.sweeps,
        reserve=options.reserve,
    )
    print(json.dumps(asdict(floor)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
