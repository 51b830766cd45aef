"""All ways to read a file give the same bytes, and name what goes wrong.

They belong to ``checkpoint``, but what matters is how the engine's threads use them.
"""

from __future__ import annotations

import errno
import mmap
import os
import signal
import subprocess
import sys
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
    choose_file_source,
)
from streammerge.errors import CheckpointError, TruncatedShardError
from streammerge.native.library import load_kernels

NBYTES = 3 * 2**20 + 4097
"""More than two steps of a mapping, and no multiple of a page."""
IMPLEMENTATIONS = [PreadSource, SeekSource, *([MmapSource] if load_kernels() else [])]

maps = pytest.mark.skipif(
    load_kernels() is None, reason="files are mapped only where compiled kernels guard it"
)


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


@maps
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


@maps
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


# -- a mapping whose file becomes shorter

PAGE = mmap.PAGESIZE


@pytest.fixture
def shrinking(tmp_path: Path) -> Path:
    path = tmp_path / "shrinking"
    path.write_bytes(bytes(range(1, 251)) * (10 * PAGE // 250))
    return path


@maps
@pytest.mark.parametrize("left", [0, 1, PAGE - 1, PAGE, PAGE + 1, 5 * PAGE + 77])
def test_a_mapping_of_a_file_that_was_cut_off_names_its_new_end(left: int, shrinking: Path) -> None:
    """Behind the end the last page reads as zeros, and the pages after it end the process."""
    content = shrinking.read_bytes()
    with MmapSource(shrinking) as source:
        os.truncate(shrinking, left)

        assert read(source, 0, left) == content[:left]
        with pytest.raises(TruncatedShardError, match=f"ends at byte {left}, .* while it was read"):
            read(source, 0, len(content))
        with pytest.raises(TruncatedShardError, match=f"ends at byte {8 * PAGE}, "):
            read(source, 8 * PAGE, 10)


@maps
def test_threads_find_the_new_end_side_by_side(shrinking: Path) -> None:
    """Each fault goes back to the copy that it interrupted."""
    content = shrinking.read_bytes()
    with MmapSource(shrinking) as source, MmapSource(shrinking) as other:
        os.truncate(shrinking, 3 * PAGE)

        def look(index: int) -> bool:
            each = (source, other)[index % 2]
            if index % 3 == 0:
                return read(each, index, PAGE) == content[index : index + PAGE]
            with pytest.raises(TruncatedShardError, match=f"ends at byte {3 * PAGE}, "):
                read(each, index, 5 * PAGE)
            return True

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(look, range(400)))


@maps
def test_a_page_of_a_mapping_that_the_disk_cannot_read_is_no_end(
    shrinking: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with MmapSource(shrinking) as source:
        monkeypatch.setattr(source, "_copy", lambda _to, _mapped, nbytes: min(nbytes, 0))

        with pytest.raises(CheckpointError, match="reading byte 7 failed: Input/output error"):
            read(source, 7, 10)


FOREIGN_FAULT = """
import ctypes, faulthandler, mmap, os, signal, sys
from streammerge.checkpoint.bytesource import MmapSource

path, when, how = sys.argv[1:]
if how == "faulthandler":
    faulthandler.enable()
if how == "python":
    signal.signal(signal.SIGBUS, lambda *_: os._exit(7))
with open(path, "rb") as file:
    foreign = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
sources = [MmapSource(path), MmapSource(path)]
os.truncate(path, 0)
for source in sources:
    try:
        source.read_into(0, memoryview(bytearray(10)))
    except Exception as error:
        print(type(error).__name__, flush=True)
if when == "after":
    for source in sources:
        source.close()
if how in ("python", "sent"):
    os.kill(os.getpid(), signal.SIGBUS)
else:
    foreign[0]
print("survived")
"""


@maps
@pytest.mark.parametrize("when", ["during", "after"])
@pytest.mark.parametrize("how", ["default", "faulthandler", "sent", "python"])
def test_what_a_mapping_does_not_guard_is_left_to_who_handled_it(
    how: str, when: str, shrinking: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FOREIGN_FAULT, str(shrinking), when, how],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )

    assert done.stdout == "TruncatedShardError\n" * 2
    assert done.returncode == (7 if how == "python" else -signal.SIGBUS)
    assert ("Fatal Python error: Bus error" in done.stderr) == (how == "faulthandler")


def test_what_cannot_be_guarded_is_not_mapped(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bytesource, "load_kernels", lambda: None)

    assert choose_file_source(ByteSourceKind.MMAP) is PreadSource
    with pytest.raises(CheckpointError, match="is not mapped without compiled kernels; use pread"):
        MmapSource(file)


# -- a file that is written to while it is open


def rewrite(path: Path) -> None:
    """Write other bytes of the same number in place, and set the old times."""
    status = path.stat()
    with path.open("r+b") as stream:
        stream.write(b"other")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def settle(path: Path) -> None:
    """Wait until the clock of the file system, which ticks every few milliseconds, has moved on."""
    before = path.stat().st_ctime_ns
    probe = path.with_name("probe")
    while True:
        probe.touch()
        if probe.stat().st_ctime_ns != before:
            probe.unlink()
            return


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_rewritten_file_with_its_old_times_is_told_from_an_untouched_one(
    implementation: OpenByteSource, shrinking: Path
) -> None:
    with implementation(shrinking) as source:
        before = source.fingerprint()
        read(source, 0, 100)
        assert not source.was_rewritten()

        settle(shrinking)
        rewrite(shrinking)

        assert source.fingerprint() == before
        assert source.was_rewritten()


@pytest.mark.parametrize("change", ["link", "unlink", "chmod", "replace"])
def test_what_changes_no_bytes_is_no_rewriting(change: str, shrinking: Path) -> None:
    """Tools that link files of a cache do so at any time; a file put in its place is another one."""
    os.link(shrinking, shrinking.with_name("second"))
    with PreadSource(shrinking) as source:
        settle(shrinking)
        if change == "link":
            os.link(shrinking, shrinking.with_name("third"))
        elif change == "unlink":
            shrinking.with_name("second").unlink()
        elif change == "chmod":
            shrinking.chmod(0o600)
        else:
            shrinking.with_name("new").write_bytes(b"new")
            shrinking.with_name("new").replace(shrinking)

        assert not source.was_rewritten()


@pytest.mark.parametrize(
    ("kind", "has_preadv", "implementation"),
    [
        (ByteSourceKind.MMAP, True, MmapSource if load_kernels() else PreadSource),
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

    assert choose_file_source(kind) is implementation
