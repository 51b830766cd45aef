"""What is known of pieces that are done keeps to what the plan reserves for it, however many they are.

Inputs and outputs are files of holes, and what stands for workers leaves their journals, as in
``benchmarks/scale.py``: forty thousand pieces of a block each, which is 20 GB of bfloat16.
"""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from models import MEMORY

import streammerge
from benchmarks.scale import Pretending, write_holes
from streammerge.checkpoint.attempts import read_attempts
from streammerge.checkpoint.bytesource import ByteSourceKind
from streammerge.executors import driving
from streammerge.plan.budgeting import records_bytes
from streammerge.plan.types import MergePlan
from streammerge.statistics import BLOCK
from streammerge.units import MIB

pytestmark = pytest.mark.skipif(os.name != "posix", reason="parts share locks as POSIX does")

TENSORS, BLOCKS, WORKERS, PARTS = 200, 200, 4, 9
REST = 6 * MIB
"""Beside what the plan has for records: rows until they are sorted, the plan's own texts, headers, code."""


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> MergePlan:
    """A plan that is cut into pieces of a block, as with a small budget."""
    root = tmp_path_factory.mktemp("holes")
    columns = BLOCKS * BLOCK // 2048
    paths = [
        write_holes(root / f"model-{number}", tensors=TENSORS, shards=5, columns=columns)
        for number in range(3)
    ]
    recipe = {
        "method": "task_arithmetic",
        "base": str(paths[0]),
        "sources": [{"path": str(path)} for path in paths[1:]],
    }
    found = streammerge.plan(recipe, memory=MEMORY, workers=1)
    assert isinstance(found, MergePlan)
    resources = replace(
        found.resources, slot_bytes=2 * BLOCK, output_slot_bytes=2 * BLOCK, slots=6, output_slots=2
    )
    return replace(found, resources=resources)


@pytest.fixture(autouse=True)
def holes_need_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("partdir", "outputdir"):
        monkeypatch.setattr(f"streammerge.checkpoint.{module}.check_room", lambda *_: None)


@pytest.fixture
def left(planned: MergePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The place of a merge whose parts are all done, and which nobody has put in place."""
    with monkeypatch.context() as patch:
        patch.setattr(driving._Driver, "_publish", lambda *_: None)
        drive(planned, tmp_path / "out", lambda _: None)
    return tmp_path / "out"


def drive(planned: MergePlan, out: Path, on_progress: Callable[[Any], None]) -> Any:
    return driving.drive(
        planned,
        out,
        Pretending(planned, slots=WORKERS),
        memory=None,
        workers=None,
        device="auto",
        device_memory=None,
        overwrite=False,
        resume=False,
        byte_source=ByteSourceKind.PREAD,
        on_progress=on_progress,
    )


@pytest.fixture
def traced() -> Iterator[Callable[[], int]]:
    """Return what tells the most memory that was allocated since the test began, buffers apart."""
    tracemalloc.start()
    yield lambda: tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()


def test_the_end_of_a_merge_in_parts_keeps_to_what_is_reserved_for_records(
    planned: MergePlan, left: Path, traced: Callable[[], int]
) -> None:
    job = driving.part_job(
        planned,
        left,
        part=0,
        parts=PARTS,
        overwrite=False,
        resume=True,
        byte_source=ByteSourceKind.PREAD,
    )

    manifest = driving.finish_parts(job, job.directory(frozenset()), lambda _: None)

    assert manifest.run.bytes_by_stage == {"read": 0, "write": 0}
    assert len(manifest.tensors) == TENSORS
    assert traced() <= records_bytes(TENSORS, TENSORS * BLOCKS) + REST


def test_a_driver_hears_of_pieces_in_little_memory(
    planned: MergePlan, left: Path, traced: Callable[[], int]
) -> None:
    """As one does that goes on with what another has left; all parts are done."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driving._Driver, "_publish", lambda *_: None)
        moved: list[int] = []
        drive(planned, left, lambda event: moved.append(event.bytes_done))

    assert traced() <= TENSORS * BLOCKS * 16 + REST


def test_the_state_of_a_merge_is_told_in_little_memory(
    left: Path, traced: Callable[[], int]
) -> None:
    status = streammerge.read_status(left)

    assert [(part.state, part.done) for part in status.parts] == [("done", 1.0)] * PARTS
    assert traced() <= 2 * MIB


def test_attempts_are_counted_without_what_they_hold(left: Path) -> None:
    partial = left.with_name("out.partial")
    epoch = next(partial.glob(".streammerge-journal-*")).name.split("-")[2]

    counted = read_attempts(partial, epoch, count=True)

    assert sum(attempt.done_numel for attempt in counted) == TENSORS * BLOCKS * BLOCK
    assert sum(attempt.lines for attempt in counted) == TENSORS * BLOCKS + PARTS
    assert all(len(attempt.records) <= 1 for attempt in counted)
