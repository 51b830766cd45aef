"""A small merge, run once for each of its calls to the system, with that call failing.

As SQLite's tests do: the first call fails, then the second, and so on to the last. Every run ends
with a named error or, where the call does not matter, without one; and every one can be resumed.
"""

from __future__ import annotations

import errno
import io
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import MEMORY, Models, recipe_of

import streammerge
from streammerge.checkpoint import outputfile
from streammerge.plan.types import MergePlan
from streammerge.statistics import BLOCK

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(os.name != "posix", reason="the calls are those of POSIX"),
]

CALLS = (
    *("open", "preadv", "pwrite", "write", "fsync", "fdatasync", "ftruncate", "lseek"),
    *("posix_fallocate", "posix_fadvise", "mkdir", "rename", "unlink", "rmdir", "scandir"),
)
"""Functions of :mod:`os` through which the engine, pathlib and shutil reach files."""
ENOUGH = 2000


class Fault:
    """Fails one call, by its number."""

    def __init__(self, number: int | None, code: int = errno.EIO) -> None:
        self.number = number
        self.code = code
        self.count = 0
        self.failed = ""
        self._lock = threading.Lock()

    def wrap(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            with self._lock:
                fails = self.count == self.number
                self.count += 1
            if fails:
                self.failed = f"{name}{arguments[:1]}"
                raise OSError(self.code, os.strerror(self.code))
            return call(*arguments, **options)

        return counted


@contextmanager
def failing(fault: Fault) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, fault.wrap(name, getattr(os, name)))
        patch.setattr(io, "open", fault.wrap("io.open", io.open))
        yield


@pytest.fixture(autouse=True)
def _sync_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputfile, "SYNC_BYTES", 4 * BLOCK)


@pytest.fixture
def plan(request: pytest.FixtureRequest, models: Models) -> MergePlan:
    """Two shards; a tensor of two chunks, small ones, and a configuration beside them."""
    method, scope = request.param
    generator = torch.Generator().manual_seed(3)

    def draw() -> dict[str, torch.Tensor]:
        shapes = {"large": (2 * BLOCK,), "b": (7, 3), "c": (5,)}
        return {name: torch.randn(*s, generator=generator) for name, s in shapes.items()}

    base = models.write(draw(), "base")
    (base / "config.json").write_text('{"model_type": "llama"}')
    recipe = recipe_of(
        method,
        base,
        [models.write(draw(), "source")],
        parameters={"density": 0.5} | scope if method == "ties" else {},
        output={"max_shard_size": "1MB"},
    )
    planned = streammerge.plan(recipe, memory=MEMORY, workers=1)
    assert len(planned.layout.shards) == 2
    resources = replace(
        planned.resources, slot_bytes=4 * BLOCK, slots=3, output_slot_bytes=4 * BLOCK, readers=1
    )
    return replace(planned, resources=resources)


def bytes_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.glob("*.safetensors"))}


def attempt(plan: MergePlan, out: Path, fault: Fault) -> streammerge.StreamMergeError | None:
    """Merge with a fault; return the named error that it ends with, if any."""
    try:
        with failing(fault):
            streammerge.merge(plan, out)
    except streammerge.StreamMergeError as error:
        return error
    return None


def fail_every(plan: MergePlan, tmp_path: Path, *, code: int, step: int) -> None:
    """Fail every ``step``-th call in a run of its own."""
    whole, out, partial = (tmp_path / name for name in ("whole", "out", "out.partial"))
    counting = Fault(None)
    with failing(counting):
        streammerge.merge(plan, whole)
    expected = bytes_of(whole)
    assert 30 < counting.count < ENOUGH
    named = harmless = 0
    for number in range(0, counting.count, step):
        fault = Fault(number, code)
        what = f"call {number}"
        error = attempt(plan, out, fault)
        if error is None:
            harmless += 1
        else:
            named += 1
            what = f"call {number}, {fault.failed}: {error}"
            assert not out.exists(), what
            streammerge.merge(plan, out, resume=True)
        assert not [t for t in threading.enumerate() if t.name.startswith("streammerge-")]
        assert bytes_of(out) == expected, what
        assert not partial.exists(), what
        shutil.rmtree(out)
    assert named > harmless


@pytest.mark.parametrize("plan", [("ties", {})], indirect=True)
def test_every_call_may_fail(plan: MergePlan, tmp_path: Path) -> None:
    fail_every(plan, tmp_path, code=errno.EIO, step=1)


@pytest.mark.parametrize("plan", [("task_arithmetic", {})], indirect=True)
def test_every_call_may_find_the_disk_full(plan: MergePlan, tmp_path: Path) -> None:
    fail_every(plan, tmp_path, code=errno.ENOSPC, step=3)


@pytest.mark.slow
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.ESTALE, errno.EROFS])
@pytest.mark.parametrize(
    "plan", [("task_arithmetic", {}), ("ties", {"scope": "model"})], indirect=True
)
def test_every_call_may_fail_in_any_way(code: int, plan: MergePlan, tmp_path: Path) -> None:
    fail_every(plan, tmp_path, code=code, step=1)
