"""Merges on engines of which something is killed at random, twenty times for each kind of thing."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from clusters import (
    SLOWER,
    DaskCluster,
    RayCluster,
    RayNode,
    Server,
    bytes_of,
    has_work,
    needs_dask,
    needs_ray,
    start_merge,
    units,
    wait_until,
    work_for_parts,
)
from models import MEMORY

import streammerge
from streammerge.checkpoint.outputform import MANIFEST_NAME
from streammerge.checkpoint.verifying import verify_files

ROUNDS = 20
KINDS = ["part", "worker", "host", "driver"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(os.name != "posix", reason="processes share locks as POSIX does"),
]

Host = Server | RayNode


class Hosts:
    """Two hosts of a cluster, of which any may be killed."""

    def __init__(self, start: Callable[[], Host]) -> None:
        """Start them."""
        self._start = start
        self.hosts = [start(), start()]

    def kill(self, kind: str, chance: random.Random) -> bool:
        """Kill something on one of them; return whether there was anything."""
        if kind == "host":
            self.hosts.pop(chance.randrange(2)).kill()
            return True
        found = units() if kind == "part" else [p for host in self.hosts for p in host.workers()]
        if not found:
            return False
        with contextlib.suppress(psutil.Error):
            chance.choice(found).kill()
        return True

    def restore(self) -> None:
        """Start what is missing."""
        while len(self.hosts) < 2:
            self.hosts.append(self._start())


def _shake(
    on: str, hosts: Hosts, kind: str, recipe: dict[str, Any], *, out: Path, chance: random.Random
) -> int:
    """Merge, kill one thing of a kind meanwhile, and go on; return the bytes that the last tries read."""
    options = ("--on", on, "--memory", "700MiB")
    process = start_merge(recipe, out, *options)
    wait_until(lambda: units() or process.poll() is not None)
    if chance.random() < 0.5:
        # While it starts; else in the middle of its work.
        seconds = chance.uniform(0.0, 4.0)
    else:
        wait_until(lambda: has_work(out) or process.poll() is not None)
        seconds = chance.uniform(0.0, 0.3)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    if kind == "driver":
        process.kill()
    else:
        hosts.kill(kind, chance)
        hosts.restore()
    _, said = process.communicate(timeout=200)
    if kind == "driver":
        again = start_merge(recipe, out, *options, "--resume")
        _, said = again.communicate(timeout=200)
        assert again.returncode == 0, said
    else:
        assert process.returncode == 0, said
    run = json.loads((out / MANIFEST_NAME).read_text())["run"]
    return sum(part["bytes_by_stage"]["read"] for part in run["parts"])


def _twenty_times(
    on: str, hosts: Hosts, kind: str, place: Path, say: Callable[[str, object], None]
) -> None:
    recipe = work_for_parts(place)
    alone = streammerge.merge(recipe, place / "alone", memory=MEMORY)
    fresh = alone.run.bytes_by_stage["read"]
    expected, out = bytes_of(place / "alone"), place / "out"
    chance = random.Random(f"{on} {kind}")  # noqa: S311 - it only chooses what to kill, and when
    read = []
    for _ in range(ROUNDS):
        read.append(_shake(on, hosts, kind, recipe, out=out, chance=chance))
        assert bytes_of(out) == expected
        assert not verify_files(out).damages
        assert not list(place.glob("out.partial*"))
        shutil.rmtree(out)
    say("rounds", ROUNDS)
    say("read less than a fresh merge", sum(each < fresh for each in read))
    # Not less each time: some are killed before anything is on the disk, and parts that lose their
    # worker may end before they notice.
    assert max(read) <= fresh


@pytest.fixture
def dask(tmp_path: Path) -> Iterator[DaskCluster]:
    (tmp_path / "cluster").mkdir()
    with DaskCluster(tmp_path / "cluster") as started:
        yield started


@pytest.fixture
def ray() -> Iterator[RayCluster]:
    with RayCluster() as started:
        yield started


@needs_dask
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_killed_on_dask_costs_no_byte(
    kind: str,
    dask: DaskCluster,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """Processes of parts, workers under their nannies, nannies with all of theirs, drivers."""
    hosts = Hosts(lambda: dask.start_worker(SLOWER))
    _twenty_times(dask.on, hosts, kind, tmp_path, record_property)


@needs_ray
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_killed_on_ray_costs_no_byte(
    kind: str,
    ray: RayCluster,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """Processes of parts, workers of Ray, whole nodes, drivers."""
    hosts = Hosts(lambda: ray.start_node(SLOWER))
    _twenty_times(ray.on, hosts, kind, tmp_path, record_property)
