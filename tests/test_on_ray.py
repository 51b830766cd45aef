"""Merges on the nodes of Ray: a real head and real nodes on loopback, undisturbed, killed and silent."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from clusters import (
    OTHER_VERSION,
    SLOW,
    RayCluster,
    bytes_of,
    has_work,
    needs_ray,
    start_merge,
    units,
    wait_until,
    work_for_parts,
)
from models import MEMORY, write_model
from test_kill_loops import JOBS

import streammerge
from streammerge.checkpoint.outputform import MANIFEST_NAME
from streammerge.checkpoint.verifying import verify_files
from streammerge.errors import ClusterError, DependencyError, NonFiniteError, ResumeError
from streammerge.executors.driving import merge_on
from streammerge.statistics import BLOCK

BUDGET = "700MiB"
pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(sys.platform == "win32", reason="processes share locks as POSIX does"),
]
slow_to_start = pytest.mark.slow
"""A head takes four seconds to start, and each node three."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    """A head and two nodes."""
    with RayCluster() as started:
        started.start_node()
        started.start_node()
        yield started


@pytest.fixture
def slow() -> Iterator[RayCluster]:
    """A head whose nodes a test starts itself."""
    with RayCluster() as started:
        yield started


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    return work_for_parts(tmp_path)


# -- undisturbed


@needs_ray
@slow_to_start
@pytest.mark.parametrize("job", ["ties over the model", "float8 codes", "adapters as task vectors"])
def test_nodes_of_a_cluster_make_the_same_bytes(
    job: str, cluster: RayCluster, tmp_path: Path
) -> None:
    recipe = JOBS[job](tmp_path)
    alone = streammerge.merge(recipe, tmp_path / "alone", memory=MEMORY)

    manifest = merge_on(recipe, tmp_path / "out", on=cluster.on, memory=MEMORY)

    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "alone")
    assert manifest.tensors == alone.tensors
    assert not verify_files(tmp_path / "out").damages
    assert not list(tmp_path.glob("out.*"))
    assert [part.part for part in manifest.run.parts] == [1, 2]
    # One thread per processor of a node; each process keeps to what it was allowed.
    assert all(part.workers == 1 for part in manifest.run.parts)
    assert all(0 < part.measured_memory <= part.memory_budget for part in manifest.run.parts)


@needs_ray
@slow_to_start
@pytest.mark.parametrize("processors", [1, 3, 8])
@pytest.mark.parametrize("job", ["ties", "ties over the model"])
def test_any_number_of_workers_makes_the_same_bytes(
    job: str, processors: int, slow: RayCluster, tmp_path: Path
) -> None:
    """Parts take a processor each, or two of eight."""
    slow.start_node(processors=processors)
    recipe = JOBS[job](tmp_path)
    streammerge.merge(recipe, tmp_path / "alone", memory=MEMORY)

    manifest = merge_on(recipe, tmp_path / "out", on=slow.on, memory=MEMORY)

    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "alone")
    threads = max(1, processors // 4)
    assert [part.workers for part in manifest.run.parts] == [threads] * (processors // threads)


@needs_ray
@slow_to_start
def test_workers_of_this_machine_need_no_cluster_and_leave_nothing(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streammerge.merge(recipe, tmp_path / "alone", memory=MEMORY)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    before = set(Path("/tmp").iterdir())  # noqa: S108 - where Ray would leave files

    process = start_merge(recipe, tmp_path / "out", "--on", "ray", "--memory", BUDGET, "--quiet")
    said, complaints = process.communicate(timeout=120)

    assert process.returncode == 0, complaints
    assert not said + complaints
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "alone")
    assert not list(home.iterdir())
    left = {path.name for path in set(Path("/tmp").iterdir()) - before}  # noqa: S108 - the same
    assert not [name for name in left if name.startswith(("ray", "streammerge-"))]
    parts = json.loads((tmp_path / "out" / MANIFEST_NAME).read_text())["run"]["parts"]
    assert sum(part["workers"] for part in parts) <= len(os.sched_getaffinity(0))


# -- errors


@needs_ray
@slow_to_start
def test_one_bad_input_is_one_error(
    cluster: RayCluster, recipe: dict[str, Any], tmp_path: Path
) -> None:
    bad = {f"{i}": torch.zeros(8 * BLOCK) for i in range(8)}
    bad["5"][7] = float("nan")
    write_model(tmp_path / "two", bad)

    process = start_merge(recipe, tmp_path / "out", "--on", cluster.on, "--memory", BUDGET)
    _, said = process.communicate(timeout=120)

    assert process.returncode == 1
    assert said.count("NonFiniteError") == 1, said
    assert "part 2/2, on " in said
    assert "Traceback" not in said
    assert "raylet" not in said
    assert not (tmp_path / "out").exists()
    with pytest.raises(NonFiniteError):
        merge_on(recipe, tmp_path / "out", on=cluster.on, memory=MEMORY)


@needs_ray
@slow_to_start
def test_a_node_of_another_version_is_refused_by_name(
    slow: RayCluster, recipe: dict[str, Any], tmp_path: Path
) -> None:
    slow.start_node(OTHER_VERSION)

    with pytest.raises(ResumeError, match=r"versions streammerge was .*, is 9\.9") as caught:
        merge_on(recipe, tmp_path / "out", on=slow.on, memory=MEMORY)

    assert any("part 1/1, on " in note for note in caught.value.__notes__)


@needs_ray
@slow_to_start
def test_a_head_that_is_not_there_is_named(recipe: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"ray://127\.0\.0\.1:9: no cluster of Ray answers"):
        merge_on(recipe, tmp_path / "out", on="ray://127.0.0.1:9", memory=MEMORY)

    assert not list(tmp_path.glob("out*"))


def test_the_library_that_is_missing_is_named(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ray.py").write_text("raise ImportError('no ray here')")
    monkeypatch.syspath_prepend(str(tmp_path))

    with pytest.raises(DependencyError, match=r"no ray here; .*pip install 'streammerge\[ray\]'"):
        merge_on(recipe, tmp_path / "out", on="ray", memory=MEMORY)

    assert not list(tmp_path.glob("out*"))


# -- faults


@needs_ray
@slow_to_start
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "silent"])
def test_a_node_that_is_lost_costs_no_byte(
    number: int, slow: RayCluster, recipe: dict[str, Any], tmp_path: Path
) -> None:
    """Ray takes ten seconds to miss a node whose connections end, seventy for one that is silent."""
    streammerge.merge(recipe, tmp_path / "alone", memory=MEMORY)
    lost = slow.start_node(SLOW)
    out = tmp_path / "out"
    process = start_merge(recipe, out, "--on", slow.on, "--memory", BUDGET)
    wait_until(lambda: has_work(out))

    lost.send(number)
    slow.start_node()
    wait_until(lambda: streammerge.read_status(out).parts[0].attempts >= 2, 150)
    # File systems take its locks from a machine that is silent.
    lost.kill()
    _, said = process.communicate(timeout=60)

    assert process.returncode == 0, said
    assert bytes_of(out) == bytes_of(tmp_path / "alone")
    run = json.loads((out / MANIFEST_NAME).read_text())["run"]
    assert max(part["attempts"] for part in run["parts"]) >= 2


@needs_ray
@slow_to_start
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_driver_that_ends_leaves_work_and_nobody_who_works(
    number: int, slow: RayCluster, recipe: dict[str, Any], tmp_path: Path
) -> None:
    alone = streammerge.merge(recipe, tmp_path / "alone", memory=MEMORY)
    slow.start_node(SLOW)
    out = tmp_path / "out"
    process = start_merge(recipe, out, "--on", slow.on, "--memory", BUDGET)
    wait_until(lambda: has_work(out))

    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode in {-number, 130}, said
    wait_until(lambda: not units(), 30)
    manifest = streammerge.merge(recipe, out, memory=MEMORY, resume=True)

    assert bytes_of(out) == bytes_of(tmp_path / "alone")
    assert manifest.run.bytes_by_stage["read"] < alone.run.bytes_by_stage["read"]


@needs_ray
@slow_to_start
def test_a_head_that_is_lost_is_an_error_and_the_merge_goes_on_later(
    slow: RayCluster, recipe: dict[str, Any], tmp_path: Path
) -> None:
    """Ray ends the process that uses it after a minute."""
    streammerge.merge(recipe, tmp_path / "alone", memory=MEMORY)
    slow.start_node(SLOW)
    out = tmp_path / "out"
    process = start_merge(recipe, out, "--on", slow.on, "--memory", BUDGET)
    wait_until(lambda: has_work(out))

    slow.head.kill()
    _, said = process.communicate(timeout=200)

    assert process.returncode == 1, said
    assert "ClusterError" in said
    assert "Traceback" not in said
    wait_until(lambda: not units(), 60)
    streammerge.merge(recipe, out, memory=MEMORY, resume=True)
    assert bytes_of(out) == bytes_of(tmp_path / "alone")
