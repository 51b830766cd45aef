"""Results in stores are verified where they lie, and tell how far they are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from models import Models
from results import OUT, names_in, with_shards
from servers import Server
from stored_models import recipe_at

import streammerge
from streammerge.checkpoint import atwork
from streammerge.cli.arguments import main
from streammerge.errors import CheckpointError, HeaderError, OutputError
from streammerge.storage import copies
from streammerge.storage.s3target import S3Target

pytest.importorskip("boto3")
pytest.importorskip("moto.server")


@pytest.fixture
def result(bucket: Any, large: Path) -> dict[str, Any]:
    """Merge to the store; return the recipe."""
    recipe = with_shards(recipe_at(str(large)))
    streammerge.merge(recipe, OUT)
    return recipe


def change(client: Any, name: str, content: bytes) -> None:
    client.put_object(Bucket="results", Key=f"folder/merged/{name}", Body=content)


def content_of(client: Any, name: str) -> bytes:
    found: bytes = client.get_object(Bucket="results", Key=f"folder/merged/{name}")["Body"].read()
    return found


def test_what_was_written_is_found_to_be(
    bucket: Any, result: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    streammerge.merge(result, tmp_path / "local")
    local = streammerge.verify_files(tmp_path / "local")

    found = streammerge.verify_files(OUT)

    assert not found.damages
    assert found.files == local.files
    assert main(["verify", OUT]) == 0
    assert capsys.readouterr().out.startswith(f"{OUT}: {local.files} files, ")


def test_every_kind_of_damage_is_named(bucket: Any, result: dict[str, Any]) -> None:
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    flipped = bytearray(content_of(bucket, first))
    flipped[-1_000_000] ^= 1
    change(bucket, first, bytes(flipped))
    head = bytearray(content_of(bucket, second))
    head[20] ^= 1
    change(bucket, second, bytes(head))
    change(bucket, "README.md", b"other")
    change(bucket, "more.txt", b"more")
    bucket.delete_object(Bucket="results", Key="folder/merged/config.json")
    card = content_of(bucket, "streammerge_manifest.json")
    change(bucket, "streammerge_manifest.json", card.replace(b'"ties"', b'"tied"'))

    found = {each.name: each for each in streammerge.verify_files(OUT).damages}

    assert {name: each.kind for name, each in found.items()} == {
        first: "corrupt",
        second: "corrupt",
        "README.md": "corrupt",
        "more.txt": "extra",
        "config.json": "missing",
        "streammerge_manifest.json": "corrupt",
    }
    assert "digest" in found[first].what
    assert main(["verify", OUT]) == 1


def test_what_the_store_does_not_give_is_unreadable(
    bucket: Any, result: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from streammerge.storage.s3 import S3Store

    read = S3Store.read_into

    def refuse(self: S3Store, what: Any, offset: int, buffer: memoryview) -> None:
        if what.url.endswith("00002.safetensors") and offset > 2**16:
            raise CheckpointError(f"{what.url}: the store answers 403")
        read(self, what, offset, buffer)

    monkeypatch.setattr(S3Store, "read_into", refuse)

    (first, second) = streammerge.verify_files(OUT).damages

    assert {first.kind, second.kind} == {"unreadable"}
    assert "the store answers 403" in first.what


def test_a_sample_is_merged_again_and_compared(
    bucket: Any, result: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(result))

    assert main(["verify", OUT, "--against", str(recipe), "--sample", "1.0"]) == 0
    assert "equal, bit by bit" in capsys.readouterr().out
    name = "model-00001-of-00002.safetensors"
    content = bytearray(content_of(bucket, name))
    content[-1] ^= 1
    change(bucket, name, bytes(content))
    found = streammerge.verify_against(result, OUT, fraction=1.0)

    assert [(each.tensor, each.element) for each in found.differing] == [
        ("layers.2.w", 900 * 1000 - 1)
    ]
    other = result | {"output": {"max_shard_size": "20MB"}}
    with pytest.raises(OutputError, match="s3://results/folder/merged"):
        streammerge.verify_against(other, OUT)


def test_a_result_on_the_hub_is_verified_there(
    models: Models, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.address)
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    recipe = recipe_at(str(server.root))
    streammerge.merge(recipe, models.root / "merged")
    shutil.rmtree(server.root)
    shutil.copytree(models.root / "merged", server.root)
    (server.root / ".gitattributes").write_text("*.safetensors filter=lfs")

    assert not streammerge.verify_files("hf://org/model").damages

    (server.root / "model.safetensors").write_bytes(
        (server.root / "model.safetensors").read_bytes()[:-1]
    )
    copies.forget_places()
    (damage,) = streammerge.verify_files("hf://org/model").damages
    assert damage.name == "model.safetensors"
    assert main(["verify", f"{server.address}/model"]) == OutputError.exit_code


def test_places_without_a_result_are_said_to_be(bucket: Any, root: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{OUT}: there is nothing there"):
        streammerge.verify_files(OUT)
    with pytest.raises(OutputError, match="neither a merged model nor an unfinished merge"):
        streammerge.read_status(OUT)
    change(bucket, "other.txt", b"")
    with pytest.raises(HeaderError, match=r"has no streammerge_manifest.json"):
        streammerge.verify_files(OUT)
    with pytest.raises(OutputError, match="is one file; name the folder"):
        streammerge.verify_files(f"{OUT}/model.safetensors")
    for place in ("hf://org/model", "https://host/model"):
        assert main(["status", place]) == OutputError.exit_code


def test_how_far_a_merge_is_is_told(
    bucket: Any, large: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = with_shards(recipe_at(str(large)))
    seen: list[streammerge.Status] = []
    complete = S3Target.complete

    def cut(self: S3Target, *arguments: Any) -> None:
        seen.append(streammerge.read_status(OUT))
        complete(self, *arguments)
        raise CheckpointError("the power is gone")

    with monkeypatch.context() as patch:
        patch.setattr(S3Target, "complete", cut)
        with pytest.raises(CheckpointError, match="the power is gone"):
            streammerge.merge(recipe, OUT)
    left = streammerge.read_status(OUT)

    assert (seen[0].complete, seen[0].unfinished, seen[0].running) == (False, True, True)
    assert (left.complete, left.unfinished, left.running) == (False, True, False)
    assert left.pieces >= seen[0].pieces > 0
    assert main(["status", OUT]) == 0
    said = capsys.readouterr().out
    assert f"{OUT}: an unfinished merge; --resume continues it; pieces in the store: " in said
    streammerge.merge(recipe, OUT, resume=True)
    assert main(["status", OUT, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["complete"]
    assert not [name for name in names_in(bucket) if name == atwork.LOCK_NAME]


def test_leaves_are_cut_as_they_were_written(bucket: Any, models: Models) -> None:
    """Tensors without elements, of one, and across the ranges that are asked for."""
    tensors = {
        "none": torch.zeros((0, 3)),
        "one": torch.ones(()),
        "many": torch.arange(3_000_000, dtype=torch.float32),
        "bytes": torch.arange(255, dtype=torch.uint8),
    }
    path = models.write(tensors, "a")
    rules = [{"tensors": "bytes", "copy": 0}]
    streammerge.merge(
        {"method": "linear", "sources": [{"path": str(path)}] * 2, "rules": rules}, OUT
    )

    assert not streammerge.verify_files(OUT).damages
