"""Whatever fails while a merge runs: the first error comes out, every thread ends, nothing is lost."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import MEMORY, Models, recipe_of
from torch import Tensor

import streammerge
from streammerge import finishing, merging, run
from streammerge.checkpoint.bytesource import ByteSource, PreadSource
from streammerge.checkpoint.outputfile import OutputFile
from streammerge.engine import plain
from streammerge.engine.progress import ProgressEvent
from streammerge.errors import (
    CheckpointError,
    DiskSpaceError,
    OutOfMemoryError,
    OutputError,
    PlanError,
    StageError,
    SystemLimitError,
    TruncatedShardError,
)
from streammerge.native.library import Kernels, load_kernels
from streammerge.plan import kernels
from streammerge.plan.chunking import Residence, iter_units
from streammerge.plan.sweeps import Needs
from streammerge.plan.types import MergePlan
from streammerge.statistics import BLOCK
from streammerge.tiles.interpreter import run_program
from streammerge.tiles.program import Op, Program

pytestmark = pytest.mark.timeout(60)

BLOCKS = 12
"""Blocks of the one large tensor; each is a chunk in ``plan``."""


@pytest.fixture
def base(models: Models) -> Path:
    return models.write({"large": torch.ones(BLOCKS * BLOCK), "small": torch.ones(3)}, "base")


@pytest.fixture
def source(models: Models) -> Path:
    tuned = {"large": torch.arange(float(BLOCKS * BLOCK)), "small": torch.zeros(3)}
    return models.write(tuned, "source")


@pytest.fixture(params=["task_arithmetic", "ties", "ties over the model", "ties in little memory"])
def plan(request: pytest.FixtureRequest, base: Path, source: Path) -> MergePlan:
    """Passing chunks, a resident tensor, a sweep over the model, a streamed tensor."""
    method = request.param.split()[0]
    parameters: dict[str, Any] = {} if method == "task_arithmetic" else {"density": 0.3}
    if "model" in request.param:
        parameters["scope"] = "model"
    recipe = recipe_of(method, base, [source], parameters=parameters)
    planned = streammerge.plan(recipe, memory=MEMORY, workers=3)
    return with_small_slots(planned, 8 if "little" in request.param else 64)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture(autouse=True)
def _nothing_is_lost(
    request: pytest.FixtureRequest, tmp_path: Path, base: Path, source: Path
) -> Iterator[None]:
    """What every test here claims besides its own: no output, no thread, no changed setting.

    What is left of the work, if anything, is enough for another run to end with the right bytes.
    """
    before = torch.get_num_threads()
    plan = request.getfixturevalue("plan") if "plan" in request.fixturenames else None
    yield
    assert not [t.name for t in threading.enumerate() if t.name.startswith("streammerge-")]
    left = {path.name for path in tmp_path.iterdir()}
    assert left - {"out.partial"} == {"base", "source"}
    assert torch.get_num_threads() == before
    if "out.partial" in left:
        streammerge.merge(plan, tmp_path / "out", resume=True)
        streammerge.merge(plan, tmp_path / "whole")
        for shard in plan.layout.shards:
            found, expected = (tmp_path / name / shard.name for name in ("out", "whole"))
            assert found.read_bytes() == expected.read_bytes()


def with_small_slots(plan: MergePlan, slots: int) -> MergePlan:
    """Cut the large tensor into chunks of one block, so that all threads have something to do."""
    resources = replace(
        plan.resources,
        slot_bytes=4 * BLOCK,
        slots=slots,
        output_slot_bytes=4 * BLOCK,
        output_slots=4,
    )
    return replace(plan, resources=resources)


def remove_outputs(models: Models) -> None:
    """Take away what succeeded, so that only leftovers of failures are found."""
    for path in models.root.glob("out*"):
        shutil.rmtree(path)


def open_with(monkeypatch: pytest.MonkeyPatch, source: type[ByteSource]) -> None:
    monkeypatch.setattr(run, "choose_byte_source", lambda _: source)


def run_with(monkeypatch: pytest.MonkeyPatch, run: Callable[..., Tensor | None]) -> None:
    monkeypatch.setattr(plain, "run_program", run)
    # It would not call it.
    monkeypatch.setattr(kernels, "load_kernels", lambda: None)


def test_the_plans_here_cover_every_way_to_hold_a_tensor(base: Path, source: Path) -> None:
    recipe = recipe_of("ties", base, [source], parameters={"density": 0.3})
    planned = streammerge.plan(recipe, memory=MEMORY)

    def residences(slots: int) -> set[Residence]:
        cut = with_small_slots(planned, slots)
        needs = Needs(cut, merging.find_method(cut.method))
        units = iter_units(cut, must_look=needs.must_look)
        return {unit.residence for unit in units}

    # The small tensor passes in both.
    assert residences(64) == {Residence.RESIDENT, Residence.PASSING}
    assert residences(8) == {Residence.STREAMED, Residence.PASSING}


# -- readers


class BadSector(PreadSource):
    """Fails in the middle of the file."""

    def _read_some(self, offset: int, buffer: memoryview) -> int:
        if offset + len(buffer) > self.fingerprint()[0] // 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super()._read_some(offset, buffer)


def test_a_failing_read_ends_the_merge(
    plan: MergePlan, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_with(monkeypatch, BadSector)

    with pytest.raises(CheckpointError, match="Input/output error"):
        streammerge.merge(plan, out)


class Shortened(PreadSource):
    """Ends early, though its size said otherwise."""

    def _read_some(self, offset: int, buffer: memoryview) -> int:
        end = self.fingerprint()[0] // 2
        return super()._read_some(offset, buffer[: max(0, end - offset)])


def test_a_short_file_ends_the_merge(
    plan: MergePlan, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_with(monkeypatch, Shortened)

    with pytest.raises(TruncatedShardError, match="changed while it was read"):
        streammerge.merge(plan, out)


class Dribbling(PreadSource):
    """Gives one page at a time."""

    def _read_some(self, offset: int, buffer: memoryview) -> int:
        return super()._read_some(offset, buffer[:4096])


def test_short_reads_are_no_fault(
    plan: MergePlan, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = models.merge(plan)
    open_with(monkeypatch, Dribbling)

    merged, _ = models.merge(plan)

    assert all(torch.equal(merged[name], expected[name]) for name in expected)
    remove_outputs(models)


def test_the_first_error_wins_and_the_later_ones_are_its_notes(
    plan: MergePlan, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All readers arrive before any may fail, so each of them has an error of its own."""
    everyone = threading.Barrier(plan.resources.readers)

    class FailingTogether(PreadSource):
        def read_into(self, offset: int, buffer: memoryview) -> None:
            everyone.wait(10)
            raise CheckpointError(f"{threading.current_thread().name} failed")

    open_with(monkeypatch, FailingTogether)

    with pytest.raises(CheckpointError, match=r"streammerge-reader-\d failed") as caught:
        streammerge.merge(plan, out)

    said = [str(caught.value), *caught.value.__notes__]
    names = [f"streammerge-reader-{index} failed" for index in range(plan.resources.readers)]
    assert sorted(line.removeprefix("then: CheckpointError: ") for line in said) == names


def test_an_error_is_raised_while_other_readers_are_still_waiting_for_the_disk(
    plan: MergePlan, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read cannot be broken off; the merge ends as soon as the disk answers."""
    failed = threading.Event()
    lock = threading.Lock()
    seen = []

    class Stuck(PreadSource):
        def read_into(self, offset: int, buffer: memoryview) -> None:
            with lock:
                first = not seen
                seen.append(offset)
            if first:
                time.sleep(0.1)
                failed.set()
                raise CheckpointError("the first one")
            failed.wait(10)
            time.sleep(0.2)
            super().read_into(offset, buffer)

    open_with(monkeypatch, Stuck)

    with pytest.raises(CheckpointError, match="the first one"):
        streammerge.merge(plan, out)
    # One read per reader at the most: nobody begins another after the failure.
    assert len(seen) <= plan.resources.readers + 1


def test_an_error_that_is_not_ours_gets_a_name(
    plan: MergePlan, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(PreadSource):
        def read_into(self, offset: int, buffer: memoryview) -> None:
            raise ZeroDivisionError("in a reader")

    open_with(monkeypatch, Broken)

    with pytest.raises(StageError, match="ZeroDivisionError: in a reader"):
        streammerge.merge(plan, out)


# -- workers


def test_a_failing_method_ends_the_merge(
    plan: MergePlan, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> Tensor | None:
        raise FloatingPointError("in a worker")

    run_with(monkeypatch, fail)

    with pytest.raises(StageError, match="FloatingPointError: in a worker"):
        streammerge.merge(plan, out)


@pytest.mark.skipif(load_kernels() is None, reason="no compiler was found at installation")
def test_a_failing_machine_ends_the_merge(
    plan: MergePlan, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> int:
        raise FloatingPointError("in a worker")

    monkeypatch.setattr(Kernels, "run", fail)

    with pytest.raises(StageError, match="FloatingPointError: in a worker"):
        streammerge.merge(plan, out)


def test_a_method_that_fails_late_ends_the_merge(
    plan: MergePlan, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When slots, statistics and write queue are in full use."""
    calls = iter(range(10**6))

    def fail_late(program: Program, *arguments: Any, **named: Any) -> Tensor | None:
        if program.uses(Op.STORE) and next(calls) == BLOCKS // 2:
            raise FloatingPointError("in a worker")
        return run_program(program, *arguments, **named)

    run_with(monkeypatch, fail_late)

    with pytest.raises(StageError, match="FloatingPointError: in a worker"):
        streammerge.merge(plan, out)


def test_a_worker_that_finds_no_memory_ends_the_merge(
    plan: MergePlan, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before its first piece of work, when the readers are already waiting for free slots."""

    class NoMemory:
        def __init__(self, *_: object) -> None:
            raise MemoryError

    monkeypatch.setattr("streammerge.engine.pipeline.open_cpu_stage", NoMemory)

    with pytest.raises(OutOfMemoryError, match="the system refused memory"):
        streammerge.merge(plan, out)


# -- writers


def full_disk(
    monkeypatch: pytest.MonkeyPatch, *, after: int, code: int = errno.ENOSPC
) -> list[int]:
    """Let writes of tensor data fail once so many bytes have been written; returns the sizes."""
    written: list[int] = []

    class FullDisk(OutputFile):
        def _write_some(self, offset: int, buffer: memoryview) -> int:
            if offset and sum(written) >= after:
                raise OSError(code, os.strerror(code))
            count = super()._write_some(offset, buffer)
            written.append(count if offset else 0)
            return count

    monkeypatch.setattr(merging, "OutputFile", FullDisk)
    return written


@pytest.mark.parametrize("after", [0, 6 * 4 * BLOCK])
def test_a_full_disk_ends_the_merge(
    after: int, plan: MergePlan, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full_disk(monkeypatch, after=after)

    with pytest.raises(DiskSpaceError, match=r"model\.safetensors: the disk is full"):
        streammerge.merge(plan, out)


def test_a_failing_write_ends_the_merge(
    plan: MergePlan, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full_disk(monkeypatch, after=0, code=errno.EIO)

    with pytest.raises(OutputError, match=r"writing at byte \d+ failed: Input/output error"):
        streammerge.merge(plan, out)


def test_short_writes_are_no_fault(
    plan: MergePlan, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = models.merge(plan)

    class Dribble(OutputFile):
        def _write_some(self, offset: int, buffer: memoryview) -> int:
            return super()._write_some(offset, buffer[:5000])

    monkeypatch.setattr(merging, "OutputFile", Dribble)

    merged, _ = models.merge(plan)

    assert all(torch.equal(merged[name], expected[name]) for name in expected)
    remove_outputs(models)


@pytest.mark.parametrize("step", ["_preallocate", "_sync"])
def test_a_disk_that_is_full_before_or_after_the_work_ends_the_merge(
    step: str, plan: MergePlan, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reserving space fails at once; a file system that lies about it fails when it must deliver."""

    def fail(_self: OutputFile) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(OutputFile, step, fail)

    with pytest.raises(DiskSpaceError, match="the disk is full"):
        streammerge.merge(plan, out)


def test_a_failing_close_closes_the_other_files_too(
    base: Path, source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_files = Path("/proc/self/fd")
    if not open_files.is_dir():
        pytest.skip("there is no list of open files to compare")
    recipe = recipe_of("linear", None, [base, source], output={"max_shard_size": 1000})
    plan = streammerge.plan(recipe, memory=MEMORY)
    assert len(plan.layout.shards) == 2

    def fail(_self: OutputFile) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(OutputFile, "_sync", fail)
    before = len(list(open_files.iterdir()))

    with pytest.raises(OutputError):
        streammerge.merge(plan, out)

    assert len(list(open_files.iterdir())) == before


def test_a_shard_that_does_not_open_is_not_published(
    plan: MergePlan, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The safetensors library has the last word."""
    monkeypatch.setattr(merging, "render_header", lambda *_: b"\xff" * 8)

    with pytest.raises(OutputError, match="does not open"):
        streammerge.merge(plan, out)


@pytest.mark.parametrize("step", ["write_sidecars", "write_manifest", "render_model_card"])
def test_a_fault_after_the_last_byte_loses_nothing(
    step: str, plan: MergePlan, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OutputError("no")

    monkeypatch.setattr(finishing, step, fail)

    with pytest.raises(OutputError, match="no"):
        streammerge.merge(plan, out)


# -- the caller


def test_an_error_in_the_receiver_of_progress_ends_the_merge(plan: MergePlan, out: Path) -> None:
    def fail(_event: ProgressEvent) -> None:
        raise LookupError("in the caller")

    with pytest.raises(LookupError, match="in the caller"):
        streammerge.merge(plan, out, on_progress=fail)


def test_an_interrupt_in_the_middle_ends_the_merge(
    plan: MergePlan, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Readers are slow, so the interrupt comes while all stages are at work."""

    class Slow(PreadSource):
        def read_into(self, offset: int, buffer: memoryview) -> None:
            time.sleep(0.05)
            super().read_into(offset, buffer)

    open_with(monkeypatch, Slow)
    interrupted: list[float] = []

    def interrupt(_event: ProgressEvent) -> None:
        interrupted.append(time.monotonic())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        streammerge.merge(plan, out, on_progress=interrupt)

    assert len(interrupted) == 1
    # What was being read is finished; what was not begun is not.
    assert time.monotonic() - interrupted[0] < 5


def test_a_system_without_more_threads_ends_the_merge(
    plan: MergePlan, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def fail_later(self: threading.Thread) -> None:
        if self.name == "streammerge-worker-1":
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", fail_later)

    with pytest.raises(SystemLimitError, match="the system starts no more threads"):
        streammerge.merge(plan, out)


def test_a_merge_that_works_restores_the_number_of_threads(plan: MergePlan, models: Models) -> None:
    torch.set_num_threads(2)
    try:
        models.merge(plan)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
        remove_outputs(models)


SLOW_MERGE = """
import os, sys, time
import streammerge.run as run
from streammerge.checkpoint.bytesource import PreadSource
from streammerge.cli.arguments import main

class Slow(PreadSource):
    def read_into(self, offset, buffer):
        os.write(1, b"reading\\n")
        time.sleep(float(os.environ.get("SLEEP", "0.2")))
        super().read_into(offset, buffer)

run.choose_byte_source = lambda _: Slow
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def slow_merge(base: Path, source: Path, tmp_path: Path, out: Path) -> Iterator[list[str]]:
    """A command line that is reading for long enough to be interrupted."""
    recipe = tmp_path / "recipe.json"
    recipe.write_text(
        json.dumps({"method": "linear", "sources": [{"path": str(p)} for p in (base, source)]})
    )
    yield [sys.executable, "-c", SLOW_MERGE, "merge", str(recipe), str(out)]
    recipe.unlink()


def start(command: list[str], **environment: str) -> subprocess.Popen[str]:
    """Start a command and wait until it reads."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "reading\n"
    return process


@pytest.mark.skipif(os.name != "posix", reason="the signal is sent as POSIX does")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_process_with_130(number: int, slow_merge: list[str]) -> None:
    process = start(slow_merge)
    process.send_signal(number)
    _, said = process.communicate(timeout=30)

    assert (process.returncode, said) == (130, "interrupted\n")


@pytest.mark.skipif(os.name != "posix", reason="the signal is sent as POSIX does")
def test_a_second_signal_does_not_wait(slow_merge: list[str], out: Path) -> None:
    """The first one waits for reads that take longer than this test may."""
    process = start(slow_merge, SLEEP="600")
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=30)

    assert (process.returncode, said) == (130, "")
    shutil.rmtree(out.with_name("out.partial"))


def test_a_plan_with_too_few_buffers_is_refused_and_waits_for_nothing(
    base: Path, source: Path, out: Path
) -> None:
    plan = streammerge.plan(recipe_of("linear", None, [base, source]), memory=MEMORY)
    edited = replace(plan, resources=replace(plan.resources, slots=1))

    with pytest.raises(PlanError, match=r"the plan has 1 buffers .* a chunk needs 2 at once"):
        streammerge.merge(edited, out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        ({"readers": 0}, "the plan has 0 readers and needs at least 1"),
        ({"workers": 0}, "the plan has 0 workers and needs at least 1"),
        ({"writers": -1}, "the plan has -1 writers and needs at least 1"),
        ({"slot_bytes": 7}, f"buffers have 7 bytes, and a block of this tensor needs {4 * BLOCK}"),
        # Compiled kernels would write past the end of it.
        ({"output_slot_bytes": 0}, "output buffers have 0 bytes, and a chunk of this tensor needs"),
    ],
)
def test_a_plan_that_cannot_be_run_is_refused_before_anything_begins(
    edit: dict[str, int], said: str, base: Path, source: Path, out: Path
) -> None:
    plan = streammerge.plan(recipe_of("linear", None, [base, source]), memory=MEMORY)
    edited = replace(plan, resources=replace(plan.resources, **edit))

    with pytest.raises(PlanError, match=said):
        streammerge.merge(edited, out)
    assert not out.with_name("out.partial").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"workers": 1.5},
        {"workers": True},
        {"workers": 0},
        {"byte_source": "x"},
        {"device": 3},
    ],
)
def test_options_that_cannot_be_are_refused_by_name(
    options: dict[str, Any], base: Path, source: Path, out: Path
) -> None:
    (name,) = options

    with pytest.raises(ValueError, match=f"^{name}: expected"):
        streammerge.merge(recipe_of("linear", None, [base, source]), out, memory=MEMORY, **options)
    assert not out.exists()
