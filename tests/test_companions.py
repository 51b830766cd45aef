"""Configuration and tokenizer belong to the plan: what was read then is what is written, or nothing is."""

from __future__ import annotations

import json
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from models import MEMORY, Models, recipe_of

import streammerge
from streammerge.errors import CheckpointError, DiskSpaceError, OutputError, ResumeError
from streammerge.plan.codec import dump_plan, parse_plan
from streammerge.plan.types import MergePlan

CONFIG = {"model_type": "llama", "torch_dtype": "float32"}
OTHER = '{"model_type": "another"}'


@pytest.fixture
def inputs(models: Models) -> list[Path]:
    tensors = {"a": torch.arange(300_000.0), "b": torch.ones(40)}
    made = [models.write(tensors, f"in-{index}") for index in range(2)]
    (made[0] / "config.json").write_text(json.dumps(CONFIG))
    (made[0] / "tokenizer.json").write_text('{"version": "1.0"}')
    return made


@pytest.fixture
def plan(inputs: list[Path]) -> MergePlan:
    return plan_of(inputs)


def plan_of(inputs: list[Path]) -> MergePlan:
    planned = streammerge.plan(recipe_of("linear", None, inputs), memory=MEMORY)
    assert isinstance(planned, MergePlan)
    return planned


@pytest.mark.parametrize("change", ["removed", "replaced"])
def test_what_happens_to_a_configuration_during_the_merge_is_of_no_matter(
    change: str,
    plan: MergePlan,
    inputs: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def alter(*_: object) -> None:
        config = inputs[0] / "config.json"
        config.unlink() if change == "removed" else config.write_text(OTHER)

    monkeypatch.setattr("streammerge.merging.check_shards", alter)

    streammerge.merge(plan, tmp_path / "out")

    assert json.loads((tmp_path / "out" / "config.json").read_text()) == CONFIG
    assert not streammerge.verify_files(tmp_path / "out").damages


def test_a_configuration_that_changed_after_the_plan_is_refused_before_work(
    plan: MergePlan, inputs: list[Path], tmp_path: Path
) -> None:
    (inputs[0] / "config.json").write_text(OTHER)

    with pytest.raises(CheckpointError, match=r"config\.json: changed since it was planned"):
        streammerge.merge(plan, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_a_configuration_that_grew_is_not_read_to_its_end(
    plan: MergePlan, inputs: list[Path], tmp_path: Path
) -> None:
    with (inputs[0] / "tokenizer.json").open("ab") as stream:
        stream.truncate(10**11)

    with pytest.raises(CheckpointError, match=r"tokenizer\.json.*it had 18 bytes"):
        streammerge.merge(plan, tmp_path / "out")


def test_a_copy_that_is_changed_in_the_output_is_noticed_and_made_again(
    plan: MergePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def alter(_plan: MergePlan, directory: Path) -> None:
        (directory / "tokenizer.json").write_text("damaged")

    with monkeypatch.context() as patch:
        patch.setattr("streammerge.merging.check_shards", alter)
        with pytest.raises(OutputError, match=r"tokenizer\.json: was changed while"):
            streammerge.merge(plan, tmp_path / "out")

    streammerge.merge(plan, tmp_path / "out", resume=True)

    assert not streammerge.verify_files(tmp_path / "out").damages
    assert (tmp_path / "out" / "tokenizer.json").read_text() == '{"version": "1.0"}'


def test_a_merge_with_another_configuration_is_another_merge(
    plan: MergePlan, inputs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise OutputError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr("streammerge.merging.check_shards", stop)
        with pytest.raises(OutputError, match="stopped"):
            streammerge.merge(plan, tmp_path / "out")
    (inputs[0] / "config.json").write_text(OTHER)

    with pytest.raises(ResumeError, match=r"companions config\.json was SHA-256"):
        streammerge.merge(plan_of(inputs), tmp_path / "out", resume=True)


def test_a_companion_of_the_future_does_not_break_the_loop(
    plan: MergePlan, inputs: list[Path], tmp_path: Path
) -> None:
    """Another machine's clock may be ahead."""
    os.utime(inputs[0] / "config.json", (4e9, 4e9))
    streammerge.merge(plan, tmp_path / "out", resume=True)
    written = (tmp_path / "out" / "streammerge_manifest.json").stat().st_mtime_ns

    streammerge.merge(plan_of(inputs), tmp_path / "out", resume=True)

    assert (tmp_path / "out" / "streammerge_manifest.json").stat().st_mtime_ns == written


def test_a_plan_tells_its_companions_and_keeps_them_as_text(plan: MergePlan) -> None:
    assert [each.name for each in plan.companions] == ["config.json", "tokenizer.json"]
    assert "config.json, tokenizer.json (67 B), from sources[0]" in str(plan)
    assert parse_plan(dump_plan(plan)) == plan


def test_a_small_output_needs_no_more_disk_than_it_takes(
    plan: MergePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1.2 MB of tensors fit a disk with 3 MB, and not one with 2."""
    usage = namedtuple("usage", "total used free")  # noqa: PYI024
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage(2**40, 2**40, 2_000_000))
        with pytest.raises(DiskSpaceError):
            streammerge.merge(plan, tmp_path / "out")
        patch.setattr(shutil, "disk_usage", lambda _: usage(2**40, 2**40, 3_000_000))
        streammerge.merge(plan, tmp_path / "out")

    taken = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*"))
    assert taken < 3_000_000
