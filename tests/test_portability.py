"""Where the system lacks a call, a slower way gives the same bytes."""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from models import MEMORY, Models, recipe_of

import streammerge
from streammerge.checkpoint import outputfile
from streammerge.checkpoint.bytesource import ByteSourceKind
from streammerge.checkpoint.outputfile import OutputFile, sync_directory

OPTIONAL = [
    "preadv",
    "pread",
    "posix_fadvise",
    "posix_fallocate",
    "pwrite",
    "pwritev",
    "fdatasync",
    "sched_getaffinity",
]
"""What ``os`` has on Linux and not everywhere."""
ADVICE = [name for name in dir(mmap) if name.startswith("MADV_")]
METHODS = {
    "linear": {},
    "ties": {"density": 0.3, "scope": "model"},
    "dare_linear": {"density": 0.3},
}


@pytest.fixture
def inputs(models: Models) -> list[Path]:
    torch.manual_seed(0)
    return [
        models.write(
            {
                "large": torch.randn(200_001).to(torch.bfloat16),
                "small": torch.randn(3, 5),
                "ids": torch.arange(7),
            },
            shards=2,
        )
        for _ in range(3)
    ]


def merged_bytes(models: Models, inputs: list[Path], method: str, kind: ByteSourceKind) -> bytes:
    out = models.new_output()
    asked = recipe_of(method, inputs[0], inputs[1:], parameters=METHODS[method])
    streammerge.merge(asked, out, memory=MEMORY, byte_source=kind)
    return (out / "model.safetensors").read_bytes()


def remove(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    for name in names:
        home = mmap if name.startswith("MADV_") else os
        monkeypatch.delattr(home, name, raising=False)


@pytest.mark.parametrize("kind", ByteSourceKind)
@pytest.mark.parametrize("method", METHODS)
def test_a_system_without_any_of_them_gives_the_same_bytes(
    method: str,
    kind: ByteSourceKind,
    models: Models,
    inputs: list[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = merged_bytes(models, inputs, method, ByteSourceKind.PREAD)
    remove(monkeypatch, *OPTIONAL, *ADVICE)

    assert merged_bytes(models, inputs, method, kind) == expected


@pytest.mark.parametrize("name", [*OPTIONAL, "MADV_SEQUENTIAL", "MADV_DONTNEED"])
@pytest.mark.parametrize("kind", ByteSourceKind)
def test_a_system_without_one_of_them_gives_the_same_bytes(
    name: str,
    kind: ByteSourceKind,
    models: Models,
    inputs: list[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = merged_bytes(models, inputs, "linear", ByteSourceKind.PREAD)
    remove(monkeypatch, name)

    assert merged_bytes(models, inputs, "linear", kind) == expected


@pytest.mark.parametrize("lacking", [(), ("pwrite",), ("posix_fallocate",), ("fdatasync",)])
def test_writes_land_at_their_place_in_any_order(
    lacking: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove(monkeypatch, *lacking)
    output = OutputFile(tmp_path / "file", 12)
    for offset, text in ((8, b"fghi"), (0, b"abcd"), (4, b"__e_")):
        output.write_at(offset, memoryview(text))
    output.close()

    assert (tmp_path / "file").read_bytes() == b"abcd__e_fghi"


@pytest.mark.parametrize("lacking", [(), ("posix_fallocate",)])
@pytest.mark.parametrize("nbytes", [0, 5_000])
def test_a_file_has_its_size_before_anything_is_written(
    nbytes: int, lacking: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove(monkeypatch, *lacking)
    OutputFile(tmp_path / "file", nbytes).close()

    assert (tmp_path / "file").stat().st_size == nbytes


def test_in_memory_no_room_is_reserved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To reserve it there is to fill it with zeros, which takes as long as to write it."""
    place = Path("/dev/shm")  # noqa: S108 - in memory is what it is about
    if not place.is_dir():
        pytest.skip("needs a file system in memory")
    reserved: list[int] = []
    monkeypatch.setattr(os, "posix_fallocate", lambda _fd, _at, nbytes: reserved.append(nbytes))
    with TemporaryDirectory(dir=place) as directory:
        output = OutputFile(Path(directory) / "file", 5_000)
        output.write_at(4_000, memoryview(b"text"))
        output.close()
        assert (Path(directory) / "file").stat().st_size == 5_000
        assert reserved == []

    monkeypatch.setattr(outputfile, "_MOUNTS", tmp_path / "none")
    OutputFile(tmp_path / "file", 5_000).close()

    assert reserved == [5_000]


def test_a_file_system_that_cannot_reserve_gets_a_sparse_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", refuse, raising=False)
    OutputFile(tmp_path / "file", 5_000).close()

    assert (tmp_path / "file").stat().st_size == 5_000


def test_directories_are_synced_where_that_is_possible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    sync_directory(tmp_path)
    assert len(synced) == (1 if os.name == "posix" else 0)

    monkeypatch.setattr(os, "name", "nt")
    sync_directory(tmp_path)
    monkeypatch.undo()
    assert len(synced) == (1 if os.name == "posix" else 0)
