"""What somebody puts into an unfinished merge: nothing outside is written to, nothing foreign published."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from models import MEMORY, Models, recipe_of

import streammerge
from streammerge.checkpoint.journal import JOURNAL_NAME
from streammerge.checkpoint.outputform import MANIFEST_NAME
from streammerge.checkpoint.ownfiles import NEW_NAME
from streammerge.checkpoint.verifying import verify_files
from streammerge.errors import OutputError
from streammerge.plan.types import MergePlan

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(os.name != "posix", reason="links are those of POSIX"),
]

SECRET = b"what lies outside\n" * 1000


@pytest.fixture
def plan(models: Models) -> MergePlan:
    tensors = {"a": torch.arange(300_000.0), "b": torch.ones(40)}
    inputs = [models.write(tensors, f"in-{index}") for index in range(2)]
    (inputs[0] / "config.json").write_text('{"dtype": "float32"}')
    (inputs[0] / "tokenizer.json").write_text("{}")
    return streammerge.plan(recipe_of("linear", None, inputs), memory=MEMORY)


@pytest.fixture
def partial(plan: MergePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A merge that stopped just before its manifest was written."""

    def stop(*_: object, **__: object) -> None:
        raise OutputError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr("streammerge.finishing.write_manifest", stop)
        with pytest.raises(OutputError, match="stopped"):
            streammerge.merge(plan, tmp_path / "out")
    return tmp_path / "out.partial"


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    path = tmp_path / "outside"
    path.write_bytes(SECRET)
    return path


OURS = ["model.safetensors", JOURNAL_NAME, ".streammerge-partial"]
REPLACED = [
    *("config.json", "tokenizer.json", "README.md", "streammerge_recipe.yaml"),
    *(MANIFEST_NAME, NEW_NAME),
]


@pytest.mark.parametrize("link", [os.symlink, os.link])
@pytest.mark.parametrize("name", [*OURS, *REPLACED])
def test_no_link_leads_a_resume_out_of_its_directory(
    name: str, link: object, plan: MergePlan, partial: Path, outside: Path
) -> None:
    (partial / name).unlink(missing_ok=True)
    link(outside, partial / name)

    if name in OURS:
        with pytest.raises(OutputError, match=f"{name}.*(symbolic link|hard links)"):
            streammerge.merge(plan, partial.with_name("out"), resume=True)
    else:
        streammerge.merge(plan, partial.with_name("out"), resume=True)
        assert not verify_files(partial.with_name("out")).damages

    assert outside.read_bytes() == SECRET


@pytest.mark.parametrize("name", ["model.safetensors", JOURNAL_NAME])
def test_a_pipe_in_the_place_of_a_file_is_refused_without_waiting(
    name: str, plan: MergePlan, partial: Path
) -> None:
    (partial / name).unlink()
    os.mkfifo(partial / name)

    with pytest.raises(OutputError, match=f"{name}: is not a regular file"):
        streammerge.merge(plan, partial.with_name("out"), resume=True)


@pytest.mark.parametrize("name", ["mine.txt", "1_Pooling/mine.json", "model-00009.safetensors"])
def test_a_foreign_file_is_named_and_not_published(
    name: str, plan: MergePlan, partial: Path
) -> None:
    (partial / name).parent.mkdir(exist_ok=True)
    (partial / name).write_text("mine")

    with pytest.raises(OutputError, match=f"{name}.*move"):
        streammerge.merge(plan, partial.with_name("out"), resume=True)
    assert (partial / name).read_text() == "mine"

    (partial / name).rename(partial.with_name("moved"))
    streammerge.merge(plan, partial.with_name("out"), resume=True)
    assert not verify_files(partial.with_name("out")).damages


def test_a_file_that_comes_while_the_merge_runs_is_not_published(
    plan: MergePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plant(_planned: MergePlan, directory: Path) -> None:
        (directory / "mine.txt").write_text("mine")

    monkeypatch.setattr("streammerge.merging.check_shards", plant)

    with pytest.raises(OutputError, match=r"mine\.txt"):
        streammerge.merge(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_a_link_is_not_written_into(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {"a": torch.arange(300_000.0)}
    inputs = [models.write(tensors, f"in-{index}") for index in range(2)]
    templates = inputs[0] / "additional_chat_templates"
    templates.mkdir()
    (templates / "tool.jinja").write_text("{{ tool }}")
    plan = streammerge.plan(recipe_of("linear", None, inputs), memory=MEMORY)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()

    def plant(_planned: MergePlan, directory: Path) -> None:
        for path in sorted((directory / templates.name).glob("*")):
            path.unlink()
        if (directory / templates.name).exists():
            (directory / templates.name).rmdir()
        (directory / templates.name).symlink_to(elsewhere)

    monkeypatch.setattr("streammerge.merging.check_shards", plant)

    with pytest.raises(OutputError, match="additional_chat_templates"):
        streammerge.merge(plan, tmp_path / "out")
    assert not list(elsewhere.iterdir())
