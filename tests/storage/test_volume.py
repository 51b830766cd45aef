"""More than fits a test with moto: models of some hundred MiB, from a store to a store."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from models import Models
from results import shards_of

import streammerge
from streammerge import storing
from streammerge.storage import copies, stores

pytest.importorskip("boto3")
pytest.importorskip("localbucket")
pytest.importorskip("benchmarks", reason="needs the project's root on the path")

from benchmarks.bucket import KEYS, Bucket, serve


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """A server of two empty buckets, in a process of its own."""
    for name in ("models", "results"):
        (tmp_path / "served" / name).mkdir(parents=True)
    with serve(tmp_path / "served") as made:
        for name, value in {"AWS_ENDPOINT_URL": made.address, **KEYS}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv(storing.SCRATCH_VARIABLE, str(tmp_path / "scratch"))
        copies.forget_places()
        stores.close_stores()
        yield made


@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_shards_of_many_parts_are_those_of_a_disk(
    scope: str, bucket: Bucket, tmp_path: Path
) -> None:
    models = Models(tmp_path / "models")
    models.root.mkdir()
    for seed, name in enumerate(("base", "a", "b")):
        generator = torch.Generator().manual_seed(seed)
        tensors = {
            f"layers.{i}.w": torch.randn((1000, 2000 + i), generator=generator) for i in range(12)
        }
        path = models.write({key: each.bfloat16() for key, each in tensors.items()}, name, shards=3)
        (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
        (tmp_path / "served" / "models" / name).mkdir()
        for each in path.iterdir():
            os.link(each, tmp_path / "served" / "models" / name / each.name)

    def recipe(place: str) -> dict[str, object]:
        return {
            "method": "ties",
            "base": f"{place}/base",
            "sources": [{"path": f"{place}/{name}"} for name in "ab"],
            "parameters": {"density": 0.3, "scope": scope},
            "output": {"max_shard_size": "40MB"},
        }

    streammerge.merge(recipe(str(models.root)), tmp_path / "local")

    manifest = streammerge.merge(recipe("s3://models"), "s3://results/merged")

    # A bucket is a folder there.
    found = tmp_path / "served" / "results" / "merged"
    assert shards_of(found) == shards_of(tmp_path / "local")
    assert not streammerge.verify_files(found).damages
    assert not streammerge.verify_files("s3://results/merged").damages
    assert sorted(path.name for path in found.iterdir()) == sorted(
        path.name for path in (tmp_path / "local").iterdir()
    )
    inputs = sum(path.stat().st_size for path in models.root.rglob("*.safetensors"))
    read = manifest.run.bytes_by_stage["read"]
    assert read <= 1.05 * inputs * (2 if scope == "model" else 1)
