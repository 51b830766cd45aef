"""All ways to read a file give the same bytes, and name what goes wrong.

They belong to ``checkpoint``, but what matters is how the engine's threads use them.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streammerge.checkpoint import bytesource
from streammerge.checkpoint.bytesource import (
    ByteSource,
    ByteSourceKind,
    MmapSource,
    OpenByteSource,
    PreadSource,
    SeekSource,
    choose_byte_source,
)
from streammerge.errors import CheckpointError, TruncatedShardError

NBYTES = 3 * 2**20 + 4097
"""More than two steps of a mapping, and no multiple of a page."""
IMPLEMENTATIONS = [PreadSource, SeekSource, MmapSource]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "file"
    path.write_bytes(np.random.default_rng(0).bytes(NBYTES))
    return path


@pytest.fixture(params=IMPLEMENTATIONS, scope="module")
def source(request: pytest.FixtureRequest, file: Path) -> Iterator[ByteSource]:
    with request.param(file) as opened:
        yield opened


def read(source: ByteSource, offset: int, nbytes: int) -> bytes:
    buffer = bytearray(nbytes)
    source.read_into(offset, memoryview(buffer))
    return bytes(buffer)


@given(st.integers(0, NBYTES), st.integers(0, NBYTES))
@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_range_is_what_the_file_holds(
    source: ByteSource, file: Path, one_end: int, other_end: int
) -> None:
    begin, end = sorted((one_end, other_end))

    assert read(source, begin, end - begin) == file.read_bytes()[begin:end]


def test_dropped_bytes_can_be_read_again(source: ByteSource, file: Path) -> None:
    source.drop(1, NBYTES - 1)

    assert read(source, 0, NBYTES) == file.read_bytes()


def test_threads_read_side_by_side(source: ByteSource, file: Path) -> None:
    """A shared file position would mix them up."""
    content = file.read_bytes()
    ranges = [(start, 5_003) for start in range(0, NBYTES - 5_003, 5_003)]

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda each: read(source, *each), ranges))

    assert found == [content[start : start + nbytes] for start, nbytes in ranges]


def test_the_end_of_the_file_is_an_error_with_its_place(source: ByteSource) -> None:
    with pytest.raises(TruncatedShardError, match=f"ends at byte {NBYTES}, .* byte {NBYTES + 5}"):
        read(source, NBYTES - 5, 10)


def test_a_range_beyond_the_file_is_an_error(source: ByteSource) -> None:
    with pytest.raises(TruncatedShardError):
        read(source, NBYTES + 1_000, 1)


def test_nothing_is_read_from_beyond_the_file_when_nothing_is_asked(source: ByteSource) -> None:
    assert read(source, NBYTES, 0) == b""


def test_fingerprint_is_size_and_time(source: ByteSource, file: Path) -> None:
    status = file.stat()

    assert source.fingerprint() == (status.st_size, status.st_mtime_ns)


def test_fingerprint_follows_the_open_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    with PreadSource(path) as source:
        path.write_bytes(b"123")
        os.utime(path, ns=(7, 7))

        assert source.fingerprint() == (3, 7)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_an_empty_file_opens_and_ends_at_once(
    implementation: OpenByteSource, tmp_path: Path
) -> None:
    """A mapping of nothing is not possible."""
    (tmp_path / "empty").touch()
    with implementation(tmp_path / "empty") as source:
        assert read(source, 0, 0) == b""
        with pytest.raises(TruncatedShardError, match="ends at byte 0"):
            read(source, 0, 1)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_missing_file_is_named(implementation: OpenByteSource, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="absent: cannot be opened: No such file"):
        implementation(tmp_path / "absent")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_closing_gives_the_descriptor_back(implementation: OpenByteSource, file: Path) -> None:
    open_files = Path("/proc/self/fd")
    if not open_files.is_dir():
        pytest.skip("there is no list of open files to compare")
    before = len(list(open_files.iterdir()))
    for _ in range(5):
        implementation(file).close()

    assert len(list(open_files.iterdir())) == before


class FewBytes(ByteSource):
    """Reads at most seven bytes a call, as a network file system may."""

    def _read_some(self, offset: int, buffer: memoryview) -> int:
        return os.preadv(self._fd, [buffer[:7]], offset)


def test_short_reads_are_continued(file: Path) -> None:
    with FewBytes(file) as source:
        assert read(source, 3, 1_000) == file.read_bytes()[3:1_003]


class Failing(ByteSource):
    """Reads ten bytes and then meets a bad sector."""

    def _read_some(self, offset: int, buffer: memoryview) -> int:
        if offset >= 10:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return min(10, len(buffer))


def test_a_failing_read_is_named_with_its_byte(file: Path) -> None:
    with (
        Failing(file) as source,
        pytest.raises(CheckpointError, match=r"file: reading byte 10 failed: Input/output error"),
    ):
        read(source, 0, 20)


def test_a_mapping_gives_its_pages_back_step_by_step(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Touched pages of a mapping count as the process's own until then."""
    forgotten: list[int] = []
    monkeypatch.setattr(
        MmapSource, "_forget", lambda _self, _offset, nbytes: forgotten.append(nbytes)
    )
    with MmapSource(file) as source:
        read(source, 5, NBYTES - 5)

    assert max(forgotten) <= bytesource._MMAP_STEP
    assert sum(forgotten) == NBYTES - 5


def test_reading_a_mapping_lets_other_threads_run(file: Path) -> None:
    """Not a proof, but a copy that held the interpreter lock would starve this counter."""
    ticks = 0
    done = threading.Event()

    def count() -> None:
        nonlocal ticks
        while not done.wait(0.0005):
            ticks += 1

    counter = threading.Thread(target=count)
    counter.start()
    with MmapSource(file) as source:
        for _ in range(20):
            read(source, 0, NBYTES)
    done.set()
    counter.join()

    assert ticks > 0


@pytest.mark.parametrize(
    ("kind", "has_preadv", "implementation"),
    [
        (ByteSourceKind.MMAP, True, MmapSource),
        (ByteSourceKind.PREAD, True, PreadSource),
        (ByteSourceKind.PREAD, False, SeekSource),
    ],
)
def test_the_implementation_is_what_the_system_has(
    kind: ByteSourceKind,
    has_preadv: bool,  # noqa: FBT001
    implementation: type[ByteSource],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not has_preadv:
        monkeypatch.delattr(os, "preadv", raising=False)

    assert choose_byte_source(kind) is implementation
