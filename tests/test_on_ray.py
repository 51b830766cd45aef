"""Merges on the nodes of Ray: a real head and real nodes on loopback, undisturbed, killed and silent."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from clusters import (
    OTHER_VERSION,
    SLOW,
    RayCluster,
    bytes_of,
    needs_ray,
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
from streammerge.errors import ClusterError, DependencyError
from streammerge.executors.driving import merge_on

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
    check_same_bytes(cluster.on, JOBS[job](tmp_path), tmp_path)


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
    rays = Path("/tmp/ray")  # noqa: S108 - where Ray would leave files
    before = rays.exists()

    process = start_merge(recipe, tmp_path / "out", "--on", "ray", "--memory", BUDGET, "--quiet")
    scratch = wait_until(lambda: scratch_of(process.pid))
    said, complaints = process.communicate(timeout=120)

    assert process.returncode == 0, complaints
    assert not said + complaints
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "alone")
    assert not list(home.iterdir())
    assert not scratch.exists()
    assert rays.exists() == before
    parts = json.loads((tmp_path / "out" / MANIFEST_NAME).read_text())["run"]["parts"]
    assert sum(part["workers"] for part in parts) <= len(os.sched_getaffinity(0))


def scratch_of(driver: int) -> Path | None:
    """Return where the process that talks to the engine keeps its files; None before it has begun."""
    for child in psutil.Process(driver).children():
        *_, module, _, scratch = ["", "", "", *child.cmdline()]
        if module == "streammerge.executors.apart":
            return Path(scratch)
    return None


# -- errors


@needs_ray
@slow_to_start
def test_one_bad_input_is_one_error(
    cluster: RayCluster, recipe: dict[str, Any], tmp_path: Path
) -> None:
    check_one_error(cluster.on, recipe, tmp_path)


@needs_ray
@slow_to_start
def test_a_node_of_another_version_is_refused_by_name(
    slow: RayCluster, recipe: dict[str, Any], tmp_path: Path
) -> None:
    slow.start_node(OTHER_VERSION)

    check_other_version(slow.on, recipe, tmp_path)


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
    process = start_and_wait(slow.on, recipe, out)

    lost.send(number)
    slow.start_node()
    wait_until(lambda: streammerge.read_status(out).parts[0].attempts >= 2, 150)
    # File systems take its locks from a machine that is silent.
    lost.kill()

    check_done_again(process, out, tmp_path / "alone", 60)


@needs_ray
@slow_to_start
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_driver_that_ends_leaves_work_and_nobody_who_works(
    number: int, slow: RayCluster, recipe: dict[str, Any], tmp_path: Path
) -> None:
    slow.start_node(SLOW)

    check_driver_that_ends(slow.on, number, recipe, tmp_path)


@needs_ray
@slow_to_start
def test_a_head_that_is_lost_is_an_error_and_the_merge_goes_on_later(
    slow: RayCluster, recipe: dict[str, Any], tmp_path: Path
) -> None:
    """Ray ends the process that uses it after a minute."""
    streammerge.merge(recipe, tmp_path / "alone", memory=MEMORY)
    slow.start_node(SLOW)
    out = tmp_path / "out"
    process = start_and_wait(slow.on, recipe, out)

    slow.head.kill()
    _, said = process.communicate(timeout=200)

    assert process.returncode == 1, said
    assert "ClusterError" in said
    assert "Traceback" not in said
    wait_until(lambda: not units(), 60)
    streammerge.merge(recipe, out, memory=MEMORY, resume=True)
    assert bytes_of(out) == bytes_of(tmp_path / "alone")
