"""An output that cannot be renamed: a mount point, or a directory in a parent that may not be written."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from models import MEMORY, Models, recipe_of

import streammerge
from streammerge.checkpoint import places
from streammerge.checkpoint.places import Place, choose_place
from streammerge.errors import DiskSpaceError, OutputError, OutputExistsError
from streammerge.plan.types import MergePlan

TENSORS = {"a": torch.arange(300_000.0), "b": torch.ones(40)}


@pytest.fixture
def plan(models: Models) -> MergePlan:
    inputs = [models.write(TENSORS, f"in-{index}") for index in range(2)]
    (inputs[0] / "config.json").write_text("{}")
    planned = streammerge.plan(recipe_of("linear", None, inputs), memory=MEMORY)
    assert isinstance(planned, MergePlan)
    return planned


@pytest.fixture(params=["tmpfs", "bind"])
def mounted(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A directory on another disk, or on the same one under a second name."""
    out = tmp_path / "out with blank"
    out.mkdir()
    (tmp_path / "volume").mkdir()
    options = ["-t", "tmpfs", "-o", "size=4m", "none"]
    if request.param == "bind":
        options = ["--bind", str(tmp_path / "volume")]
    done = subprocess.run(["mount", *options, str(out)], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("needs the right to mount")
    yield out
    subprocess.run(["umount", "-l", str(out)], check=True)


def test_a_mount_point_is_filled_from_inside(plan: MergePlan, mounted: Path) -> None:
    streammerge.merge(plan, mounted)

    assert not streammerge.verify_files(mounted).damages
    assert not [path for path in mounted.parent.iterdir() if path.name.endswith(".partial")]
    names = {path.name for path in mounted.iterdir()}
    assert not any(name.startswith((".", mounted.name)) for name in names), names


def test_a_merge_in_a_mount_point_is_refused_replaced_and_found_complete(
    plan: MergePlan, mounted: Path
) -> None:
    streammerge.merge(plan, mounted)
    written = (mounted / "streammerge_manifest.json").stat().st_ino

    with pytest.raises(OutputExistsError, match="give --overwrite"):
        streammerge.merge(plan, mounted)
    streammerge.merge(plan, mounted, resume=True)
    assert (mounted / "streammerge_manifest.json").stat().st_ino == written

    streammerge.merge(plan, mounted, overwrite=True)
    assert (mounted / "streammerge_manifest.json").stat().st_ino != written
    assert not streammerge.verify_files(mounted).damages


def test_the_disk_that_is_asked_for_room_is_the_one_that_is_written(
    models: Models, mounted: Path, request: pytest.FixtureRequest
) -> None:
    if "tmpfs" not in request.node.name:
        pytest.skip("the other one has the room of the test's own disk")
    large = {"a": torch.zeros(2_000_000)}
    inputs = [models.write(large, f"large-{index}") for index in range(2)]

    with pytest.raises(DiskSpaceError, match="out with blank"):
        streammerge.merge(recipe_of("linear", None, inputs), mounted, memory=MEMORY)
    assert not list(mounted.iterdir())


def test_a_file_of_the_user_in_a_mount_point_is_neither_moved_nor_replaced(
    plan: MergePlan, mounted: Path
) -> None:
    (mounted / "mine.txt").write_text("mine")

    for options in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(OutputExistsError, match=r"holds 1 file"):
            streammerge.merge(plan, mounted, **options)
    assert [path.name for path in mounted.iterdir()] == ["mine.txt"]


def test_a_file_that_comes_in_the_way_stops_the_last_step_and_nothing_is_lost(
    plan: MergePlan, mounted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = places.put_in_place

    def plant(place: Place) -> None:
        (mounted / "model.safetensors").write_text("mine")
        put(place)

    with monkeypatch.context() as patch:
        patch.setattr("streammerge.checkpoint.outputdir.put_in_place", plant)
        with pytest.raises(OutputError, match="cannot be put in place"):
            streammerge.merge(plan, mounted)

    found = [
        path.read_text()
        for path in mounted.rglob("*")
        if path.name == "model.safetensors" and path.stat().st_size == 4
    ]
    assert found == ["mine"]


def test_what_a_file_system_keeps_in_its_root_is_no_file_of_a_merge(
    plan: MergePlan, mounted: Path
) -> None:
    (mounted / "lost+found").mkdir()

    streammerge.merge(plan, mounted)

    assert (mounted / "lost+found").is_dir()


def test_a_directory_in_a_parent_that_may_not_be_written_is_filled_from_inside(
    plan: MergePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "locked" / "out"
    out.mkdir(parents=True)
    access = os.access

    def deny(path: Path, mode: int, **options: bool) -> bool:
        return path != out.parent and access(path, mode, **options)

    monkeypatch.setattr(os, "access", deny)

    assert choose_place(out).inside
    streammerge.merge(plan, out)
    assert not streammerge.verify_files(out).damages


def test_usual_outputs_grow_beside_their_place(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for name in ("there", "missing"):
        place = choose_place(tmp_path / name)
        assert (place.partial, place.inside) == (tmp_path / f"{name}.partial", False)
