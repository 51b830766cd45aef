"""Merges on the workers of Dask: real processes on loopback, undisturbed, killed and given up."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from clusters import (
    OTHER_VERSION,
    ROOT,
    SLOW,
    SLOWER,
    DaskCluster,
    Wire,
    bytes_of,
    has_work,
    needs_dask,
    start_merge,
    units,
    wait_until,
    work_for_parts,
)
from engines import (
    BUDGET,
    check_done_again,
    check_driver_that_ends,
    check_one_error,
    check_other_version,
    check_same_bytes,
    start_and_wait,
)
from models import MEMORY
from test_kill_loops import JOBS

import streammerge
from streammerge.checkpoint.outputform import MANIFEST_NAME
from streammerge.checkpoint.verifying import verify_files
from streammerge.cli.arguments import main
from streammerge.errors import (
    ClusterError,
    DependencyError,
    OutputError,
    RecipeError,
)
from streammerge.executors import apart, dask, driving
from streammerge.executors.apart import ExecutorApart, connect
from streammerge.executors.driving import choose_parts, merge_on
from streammerge.executors.seam import Outcome
from streammerge.executors.unit import run_unit
from streammerge.parting import merge_part
from streammerge.plan.types import MergePlan

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(os.name != "posix", reason="processes share locks as POSIX does"),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaskCluster]:
    """A scheduler and two workers."""
    with DaskCluster(tmp_path_factory.mktemp("cluster")) as started:
        started.start_worker()
        started.start_worker()
        with contextlib.closing(ExecutorApart(started.on)) as executor:
            wait_until(lambda: executor.workers() == 2)
        yield started


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[DaskCluster]:
    """A scheduler whose workers a test starts itself."""
    (tmp_path / "cluster").mkdir()
    with DaskCluster(tmp_path / "cluster") as started:
        yield started


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    return work_for_parts(tmp_path)


# -- undisturbed


@needs_dask
@pytest.mark.parametrize("job", ["ties over the model", "float8 codes", "adapters as task vectors"])
def test_workers_of_a_scheduler_make_the_same_bytes(
    job: str, cluster: DaskCluster, tmp_path: Path
) -> None:
    check_same_bytes(cluster.on, JOBS[job](tmp_path), tmp_path)


@needs_dask
def test_progress_and_the_end_are_told_for_all_workers_together(
    cluster: DaskCluster, recipe: dict[str, Any], tmp_path: Path
) -> None:
    process = start_merge(
        recipe, tmp_path / "out", "--on", cluster.on, "--json", "--memory", BUDGET
    )
    said, complaints = process.communicate(timeout=120)

    assert process.returncode == 0, complaints
    events = [json.loads(line) for line in said.splitlines()]
    done = [event["bytes_done"] for event in events if event["event"] == "progress"]
    planned = streammerge.plan(recipe, memory=MEMORY)
    assert isinstance(planned, MergePlan)
    assert done == sorted(done)
    assert events[-1]["event"] == "done"
    assert events[-1]["parts"] == 2
    assert events[-1]["bytes_by_stage"] == {
        "read": planned.input_nbytes,
        "write": planned.layout.data_nbytes,
    }


@needs_dask
def test_workers_of_this_machine_need_no_scheduler(recipe: dict[str, Any], tmp_path: Path) -> None:
    streammerge.merge(recipe, tmp_path / "alone", memory=MEMORY)

    process = start_merge(recipe, tmp_path / "out", "--on", "dask", "--memory", BUDGET, "--quiet")
    said, complaints = process.communicate(timeout=120)
    again = start_merge(recipe, tmp_path / "out", "--on", "dask", "--resume", "--memory", BUDGET)
    _, complete = again.communicate(timeout=120)

    assert (process.returncode, again.returncode) == (0, 0), complaints
    assert not said + complaints
    assert "is complete already" in complete
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "alone")
    parts = json.loads((tmp_path / "out" / MANIFEST_NAME).read_text())["run"]["parts"]
    assert len(parts) == max(1, min(4, len(os.sched_getaffinity(0))))


@needs_dask
def test_the_engine_goes_on_with_what_parts_began_and_the_reverse(
    cluster: DaskCluster, recipe: dict[str, Any], tmp_path: Path
) -> None:
    streammerge.merge(recipe, tmp_path / "alone", memory=MEMORY)
    merge_part(recipe, tmp_path / "out", part=2, parts=3, memory=MEMORY)

    manifest = merge_on(recipe, tmp_path / "out", on=cluster.on, memory=MEMORY)

    # As many as it was begun in.
    assert [(part.part, part.parts, part.attempts) for part in manifest.run.parts] == [
        (1, 3, 1),
        (2, 3, 1),
        (3, 3, 1),
    ]
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "alone")


# -- errors


@needs_dask
def test_one_bad_input_is_one_error(
    cluster: DaskCluster, recipe: dict[str, Any], tmp_path: Path
) -> None:
    check_one_error(cluster.on, recipe, tmp_path)


@needs_dask
def test_a_worker_of_another_version_is_refused_by_name(
    slow: DaskCluster, recipe: dict[str, Any], tmp_path: Path
) -> None:
    slow.start_worker(OTHER_VERSION)

    check_other_version(slow.on, recipe, tmp_path)


@needs_dask
def test_a_budget_that_is_too_small_for_a_worker_is_refused_by_it(
    cluster: DaskCluster, recipe: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(streammerge.StreamMergeError, match="give --memory"):
        merge_on(recipe, tmp_path / "out", on=cluster.on, memory="60MiB")


def test_paths_that_a_worker_does_not_have_are_named() -> None:
    outcome = run_unit({"part": 1, "directory": "/no/such/directory"})

    assert outcome.error is not None
    assert "/no/such/directory: no such directory on" in outcome.error["message"]


def test_a_merge_that_a_worker_does_not_see_is_not_begun_there(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another disk under the same path: nothing may be made on it."""
    monkeypatch.setattr("streammerge.checkpoint.partdir._SEEN_SECONDS", 0.3)
    planned = streammerge.plan(recipe, memory=MEMORY)
    assert isinstance(planned, MergePlan)
    job = driving.part_job(
        planned,
        tmp_path / "out",
        part=1,
        parts=2,
        overwrite=False,
        resume=True,
        byte_source=streammerge.checkpoint.bytesource.ByteSourceKind.PREAD,
        epoch="0123456789abcdef",
    )

    with pytest.raises(OutputError, match="does not see the merge that is begun there"):
        job.run(lambda _: None)

    assert not list(tmp_path.glob("out*"))


@needs_dask
def test_a_scheduler_that_is_not_there_is_named(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dask, "_CONNECT_SECONDS", 1)
    monkeypatch.setattr(driving, "open_executor", lambda on: connect(on, tmp_path))

    with pytest.raises(ClusterError, match=r"dask://127\.0\.0\.1:9: no scheduler answers"):
        merge_on(recipe, tmp_path / "out", on="dask://127.0.0.1:9", memory=MEMORY)

    assert not list(tmp_path.glob("out*"))


@needs_dask
def test_a_scheduler_without_workers_is_not_waited_for_for_ever(
    slow: DaskCluster, recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driving, "_LONELY_SECONDS", 1.0)

    with pytest.raises(ClusterError, match="no worker has been there"):
        merge_on(recipe, tmp_path / "out", on=slow.on, memory=MEMORY)

    assert not list(tmp_path.glob("out*"))


def test_the_library_that_is_missing_is_named(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "distributed.py").write_text("raise ImportError('no dask here')")
    monkeypatch.syspath_prepend(str(tmp_path))

    with pytest.raises(DependencyError, match=r"no dask here; .*pip install 'streammerge\[dask\]'"):
        merge_on(recipe, tmp_path / "out", on="dask", memory=MEMORY)


@pytest.mark.parametrize(
    "on", ["", "ray:", "ray://head", "dask:", "dask://", "dask://host", "dask://:80", "spark://a:1"]
)
def test_engines_that_are_not_known_are_refused(
    on: str, recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(
        ValueError, match=r"expected dask or dask://HOST:PORT, ray or ray://HOST:PORT, got"
    ):
        merge_on(recipe, tmp_path / "out", on=on)
    with pytest.raises(SystemExit) as refused:
        main(["merge", "recipe.yaml", "out", f"--on={on}"])
    assert refused.value.code == 2
    assert repr(on) in capsys.readouterr().err


@needs_dask
def test_combinations_of_adapters_are_not_done_on_an_engine(tmp_path: Path) -> None:
    from models import write_adapter

    adapters = [
        write_adapter(tmp_path / name, {"layer.weight": (8, 8)}, seed=seed)
        for seed, name in enumerate("ab")
    ]
    recipe = {"method": "linear", "sources": [{"path": str(path)} for path in adapters]}
    with pytest.raises(RecipeError, match="leave --part and --on out"):
        merge_on(recipe, tmp_path / "out", on="dask")


# -- faults


@needs_dask
def test_a_worker_that_is_lost_costs_no_byte(
    slow: DaskCluster, recipe: dict[str, Any], tmp_path: Path
) -> None:
    streammerge.merge(recipe, tmp_path / "alone", memory=MEMORY)
    lost = slow.start_worker(SLOW)
    out = tmp_path / "out"
    process = start_and_wait(slow.on, recipe, out)

    # The worker, its nanny and the process of the part.
    for each in units():
        each.kill()
    lost.kill()
    slow.start_worker()

    check_done_again(process, out, tmp_path / "alone", 120)


@needs_dask
def test_a_process_that_is_killed_is_started_again_and_not_for_ever(
    slow: DaskCluster, recipe: dict[str, Any], tmp_path: Path
) -> None:
    streammerge.merge(recipe, tmp_path / "alone", memory=MEMORY)
    slow.start_worker(SLOW)
    out = tmp_path / "out"
    process = start_merge(recipe, out, "--on", slow.on, "--memory", BUDGET)
    while process.poll() is None:
        if has_work(out):
            for each in units():
                each.kill()
        time.sleep(0.1)
    _, said = process.communicate()
    assert process.returncode == 1
    assert "part 1/1 was lost 3 times" in said, said
    assert "its process was ended by signal 9" in said

    manifest = streammerge.merge(recipe, out, memory=MEMORY, resume=True)

    assert manifest.run.resumed
    assert bytes_of(out) == bytes_of(tmp_path / "alone")


@needs_dask
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_driver_that_ends_leaves_work_and_nobody_who_works(
    number: int, slow: DaskCluster, recipe: dict[str, Any], tmp_path: Path
) -> None:
    slow.start_worker(SLOW)

    check_driver_that_ends(slow.on, number, recipe, tmp_path)


@needs_dask
@pytest.mark.slow
def test_a_worker_whose_network_is_cut_costs_no_byte(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its connections stay, and say nothing; the scheduler's ``worker-ttl`` bounds how long.

    After that Dask waits for half a minute for its nanny to end it.
    """
    monkeypatch.setenv("DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL", "2s")
    streammerge.merge(recipe, tmp_path / "alone", memory=MEMORY)
    out = tmp_path / "out"
    (tmp_path / "cluster").mkdir()
    with (
        DaskCluster(tmp_path / "cluster") as cluster,
        contextlib.closing(Wire(cluster.on.removeprefix("dask://"))) as wire,
    ):
        cluster.start_worker(SLOW, through=wire.address)
        process = start_and_wait(cluster.on, recipe, out)

        wire.cut()
        cluster.start_worker()
        check_done_again(process, out, tmp_path / "alone", 120)


@needs_dask
def test_a_scheduler_that_falls_silent_is_an_error_in_a_stated_time(
    slow: DaskCluster, recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(apart, "SILENT_SECONDS", 4.0)
    monkeypatch.setattr(apart, "_CLOSE_SECONDS", 1.0)
    monkeypatch.setattr(driving, "_DRAIN_SECONDS", 1.0)
    streammerge.merge(recipe, tmp_path / "alone", memory=MEMORY)
    slow.start_worker(SLOWER)
    out = tmp_path / "out"
    stopped: list[bool] = []

    def stop(_: Any) -> None:
        if not stopped and has_work(out):
            slow.scheduler.send(signal.SIGSTOP)
            stopped.append(True)

    with pytest.raises(ClusterError, match=r"has not answered for 4 s.*goes on with what is done"):
        merge_on(recipe, out, on=slow.on, memory=MEMORY, on_progress=stop)

    wait_until(lambda: not units(), 30)
    streammerge.merge(recipe, out, memory=MEMORY, resume=True)
    assert bytes_of(out) == bytes_of(tmp_path / "alone")


UNSEEN = (
    "from streammerge.checkpoint import locking\nlocking.FileLock.acquire = lambda *_, **__: True\n"
)
"""Of a machine whose locks nobody sees."""


@needs_dask
@pytest.mark.parametrize("parts", [False, True], ids=["by one process", "on the engine"])
def test_a_part_that_lives_on_unseen_leaves_the_merge_after_it_alone(
    parts: bool,  # noqa: FBT001
    slow: DaskCluster,
    recipe: dict[str, Any],
    tmp_path: Path,
) -> None:
    """Its machine is silent while its driver ends and another merge takes the place, and then goes on."""
    other = recipe | {"parameters": {"density": 0.7}}
    streammerge.merge(other, tmp_path / "alone", memory=MEMORY)
    worker = slow.start_worker(SLOW + UNSEEN)
    out = tmp_path / "out"
    process = start_and_wait(slow.on, recipe, out)
    (orphan,) = units()
    orphan.suspend()
    process.kill()
    process.communicate()

    if parts:
        worker.kill_alone()
        slow.start_worker()
        merge_on(other, out, on=slow.on, memory=MEMORY, overwrite=True)
    else:
        streammerge.merge(other, out, memory=MEMORY, overwrite=True)
    orphan.resume()
    wait_until(lambda: not units(), 60)

    assert bytes_of(out) == bytes_of(tmp_path / "alone")
    assert not verify_files(out).damages
    assert not list(tmp_path.glob("out.partial*"))


# -- the driver, without an engine


@pytest.mark.parametrize(
    ("work", "workers", "parts"),
    [
        (0, 1, 1),
        (1, 3, 3),
        (40 * 2**30, 2, 5),
        (100 * 2**30, 2, 8),  # four for each worker
        (2**42, 100, 400),
        (100 * 2**30, 100, 100),
    ],
)
def test_parts_are_a_few_for_each_worker_if_they_are_worth_it(
    work: int, workers: int, parts: int
) -> None:
    assert choose_parts(work, workers) == parts


class InTurn:
    """An engine whose workers are this process, one part after the other."""

    def __init__(self, lost: set[int]) -> None:
        self._lost = lost
        self._ended: list[Outcome] = []
        self.submitted: list[int] = []

    def workers(self) -> int:
        return 3

    def idle(self) -> int:
        return 3 - len(self._ended)

    def running(self) -> int:
        return len(self._ended)

    def submit(self, request: dict[str, Any]) -> None:
        part = request["part"]
        self.submitted.append(part)
        if part in self._lost:
            self._lost.discard(part)
            self._ended.append(Outcome(part, "here", lost="it was lost"))
        else:
            self._ended.append(run_unit({**request, "workers": 1}))

    def gather(self, _seconds: float) -> list[Outcome]:
        ended, self._ended = self._ended, []
        return ended

    def close(self) -> None:
        pass


def test_only_what_was_lost_is_done_again(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = InTurn({2})
    monkeypatch.setattr(driving, "open_executor", lambda _: engine)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    streammerge.merge(recipe, tmp_path / "alone", memory=MEMORY)

    merge_on(recipe, tmp_path / "out", on="dask", memory=MEMORY)

    assert sorted(engine.submitted) == [1, 2, 2, 3]
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "alone")
