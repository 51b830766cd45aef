"""Models in S3 merge to the bytes that they have on a disk."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import tiny
from models import Models, assert_same_model, load_model
from stored_models import draw, recipe_at

import streammerge
from streammerge.cli.arguments import main
from streammerge.errors import CheckpointError
from streammerge.storage import copies, stores

boto3 = pytest.importorskip("boto3")

SECRET = "wJalrXUtnFEMIsecretEXAMPLEKEY"  # noqa: S105 - of nobody


@pytest.fixture
def bucket(address: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("AWS_ENDPOINT_URL", address)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    client = boto3.client("s3")
    client.create_bucket(Bucket="models")
    upload(client, root)
    yield client
    for each in client.list_objects_v2(Bucket="models").get("Contents", ()):
        client.delete_object(Bucket="models", Key=each["Key"])
    client.delete_bucket(Bucket="models")


def upload(client: Any, root: Path) -> None:
    for path in root.rglob("*"):
        if path.is_file():
            client.upload_file(str(path), "models", path.relative_to(root).as_posix())


def test_bytes_are_those_of_a_disk(bucket: Any, root: Path, tmp_path: Path) -> None:
    streammerge.merge(recipe_at(str(root)), tmp_path / "local")

    manifest = streammerge.merge(recipe_at("s3://models"), tmp_path / "out")

    assert_same_model(load_model(tmp_path / "out"), load_model(tmp_path / "local"))
    assert not streammerge.verify_files(tmp_path / "out").damages
    assert manifest.inputs[0].origin == "s3://models/base/model.safetensors"
    for path in (tmp_path / "out").iterdir():
        assert SECRET.encode() not in path.read_bytes()


def test_an_index_names_shards_and_one_object_is_a_model(
    bucket: Any, root: Path, tmp_path: Path
) -> None:
    def recipe(place: str) -> dict[str, object]:
        paths = [f"{place}/a/model.safetensors", f"{place}/b/"]
        return {"method": "linear", "sources": [{"path": path} for path in paths]}

    streammerge.merge(recipe(str(root)), tmp_path / "local")
    streammerge.merge(recipe("s3://models"), tmp_path / "out")

    assert_same_model(load_model(tmp_path / "out"), load_model(tmp_path / "local"))


def test_an_object_that_changes_meanwhile_is_refused(
    bucket: Any, root: Path, tmp_path: Path
) -> None:
    planned = streammerge.plan(recipe_at("s3://models"))
    Models(root).write(draw(9), "a")
    upload(bucket, root)

    with pytest.raises(
        CheckpointError, match=r"s3://models/a/model\.safetensors: changed since it"
    ):
        streammerge.merge(planned, tmp_path / "out")


def test_a_merge_that_was_killed_goes_on_in_another_process(
    bucket: Any, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streammerge.merge(recipe_at(str(root)), tmp_path / "local")
    from streammerge.storage.s3 import S3Store

    whole = S3Store.read_into
    calls: list[int] = []

    def cut(self: S3Store, what: Any, offset: int, buffer: memoryview) -> None:
        if len(buffer) > 2**16:
            calls.append(offset)
        if len(calls) > 2:
            raise CheckpointError("the power is gone")
        whole(self, what, offset, buffer)

    monkeypatch.setattr(S3Store, "read_into", cut)
    with pytest.raises(CheckpointError, match="the power is gone"):
        streammerge.merge(recipe_at("s3://models"), tmp_path / "out")
    monkeypatch.undo()
    # As another process would, which has other copies in another place.
    for name, value in (("AWS_ACCESS_KEY_ID", "AKIAEXAMPLE"), ("AWS_SECRET_ACCESS_KEY", SECRET)):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", bucket.meta.endpoint_url)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    copies.forget_places()
    stores.close_stores()

    streammerge.merge(recipe_at("s3://models"), tmp_path / "out", resume=True)

    assert_same_model(load_model(tmp_path / "out"), load_model(tmp_path / "local"))


def test_adapters_and_their_base_may_lie_there(bucket: Any, root: Path, tmp_path: Path) -> None:
    model = tiny.llama()
    model.save_pretrained(root / "tiny")
    for index in range(2):
        tiny.make_lora(root / f"lora{index}", model, seed=index, r=4)
    upload(bucket, root)

    def recipe(place: str) -> dict[str, object]:
        sources = [{"path": f"{place}/lora{index}"} for index in range(2)]
        return {
            "method": "ties",
            "base": f"{place}/tiny",
            "sources": sources,
            "parameters": {"density": 0.5},
        }

    streammerge.merge(recipe(str(root)), tmp_path / "local")
    streammerge.merge(recipe("s3://models"), tmp_path / "out")
    assert_same_model(load_model(tmp_path / "out"), load_model(tmp_path / "local"))
    # Without a base they are combined, which reads them another way.
    combined = {"method": "linear", "sources": recipe("s3://models")["sources"]}
    streammerge.merge(combined, tmp_path / "combined")
    alone = {"method": "linear", "sources": recipe(str(root))["sources"]}
    streammerge.merge(alone, tmp_path / "alone")
    names = "adapter_model.safetensors"
    assert (tmp_path / "combined" / names).read_bytes() == (tmp_path / "alone" / names).read_bytes()


def test_an_adapter_is_extracted_from_there(bucket: Any, root: Path, tmp_path: Path) -> None:
    model = tiny.llama()
    model.save_pretrained(root / "old")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    model.save_pretrained(root / "new")
    upload(bucket, root)
    for place, out in (("s3://models", "there"), (str(root), "here")):
        command = ["extract", f"{place}/old", f"{place}/new", str(tmp_path / out), "--rank", "4"]
        assert main([*command, "--quiet"]) == 0, command

    name = "adapter_model.safetensors"
    assert (tmp_path / "there" / name).read_bytes() == (tmp_path / "here" / name).read_bytes()


def test_what_is_refused_is_said_without_secrets(bucket: Any, tmp_path: Path) -> None:
    for path, said in (
        ("s3://models/nothing", "s3://models/nothing: there is nothing there"),
        ("s3://nobody/nothing", "s3://nobody/nothing"),
    ):
        with pytest.raises(CheckpointError, match=said) as caught:
            streammerge.plan({"method": "linear", "sources": [{"path": path}]})
        assert SECRET not in str(caught.value)


def test_files_of_pytorch_are_refused(bucket: Any, root: Path) -> None:
    bucket.upload_fileobj(io.BytesIO(b"PK"), "models", "old/pytorch_model.bin")

    with pytest.raises(
        CheckpointError, match=r"old/pytorch_model.bin: files of PyTorch are read from"
    ):
        streammerge.plan({"method": "linear", "sources": [{"path": "s3://models/old"}]})


def test_names_lead_nowhere_else(bucket: Any, tmp_path: Path) -> None:
    bucket.upload_fileobj(io.BytesIO(b"{}"), "models", "base/../../../evil.json")
    planned = streammerge.plan(recipe_at("s3://models"))
    place = Path(planned.models[0].path)
    assert not list(place.parents[3].rglob("evil.json"))

    bucket.upload_fileobj(io.BytesIO(b"{}"), "models", "base//evil.json")
    copies.forget_places()
    with pytest.raises(CheckpointError, match="is no name of a file"):
        streammerge.plan(recipe_at("s3://models"))


def test_it_needs_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "boto3", None)

    with pytest.raises(
        streammerge.errors.DependencyError, match=r"pip install 'streammerge\[s3\]'"
    ):
        streammerge.plan({"method": "linear", "sources": [{"path": "s3://models/a"}]})
