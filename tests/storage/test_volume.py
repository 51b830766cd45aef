"""More than fits a test with moto: models of some hundred MiB, from a store to a store."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from models import Models
from results import shards_of

import streammerge
from streammerge.checkpoint.scratch import SCRATCH_VARIABLE
from streammerge.storage import copies, stores

pytest.importorskip("boto3")
pytest.importorskip("localbucket")
pytest.importorskip("benchmarks", reason="needs the project's root on the path")

from benchmarks.bucket import KEYS, Bucket, serve


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """A server of two empty buckets, in a process of its own."""
    for name in ("models", "results"):
        (tmp_path / "served" / name).mkdir(parents=True, exist_ok=True)
    with serve(tmp_path / "served") as made:
        for name, value in {"AWS_ENDPOINT_URL": made.address, **KEYS}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv(SCRATCH_VARIABLE, str(tmp_path / "scratch"))
        copies.forget_places()
        stores.close_stores()
        yield made


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """Three models of 48 MB in three shards, on the disk and, as the same files, in the store."""
    models = Models(tmp_path / "models")
    models.root.mkdir()
    for seed, name in enumerate(("base", "a", "b")):
        generator = torch.Generator().manual_seed(seed)
        tensors = {
            f"layers.{i}.w": torch.randn((1000, 2000 + i), generator=generator) for i in range(12)
        }
        path = models.write({key: each.bfloat16() for key, each in tensors.items()}, name, shards=3)
        (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
        (tmp_path / "served" / "models" / name).mkdir(parents=True)
        for each in path.iterdir():
            os.link(each, tmp_path / "served" / "models" / name / each.name)
    return models.root


def recipe_at(place: str, scope: str) -> dict[str, object]:
    return {
        "method": "ties",
        "base": f"{place}/base",
        "sources": [{"path": f"{place}/{name}"} for name in "ab"],
        "parameters": {"density": 0.3, "scope": scope},
        "output": {"max_shard_size": "40MB"},
    }


@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_shards_of_many_parts_are_those_of_a_disk(
    scope: str, models: Path, bucket: Bucket, tmp_path: Path
) -> None:
    streammerge.merge(recipe_at(str(models), scope), tmp_path / "local")

    manifest = streammerge.merge(recipe_at("s3://models", scope), "s3://results/merged")

    # A bucket is a folder there.
    found = tmp_path / "served" / "results" / "merged"
    assert shards_of(found) == shards_of(tmp_path / "local")
    assert not streammerge.verify_files(found).damages
    assert not streammerge.verify_files("s3://results/merged").damages
    assert sorted(path.name for path in found.iterdir()) == sorted(
        path.name for path in (tmp_path / "local").iterdir()
    )
    inputs = sum(path.stat().st_size for path in models.rglob("*.safetensors"))
    read = manifest.run.bytes_by_stage["read"]
    assert read <= 1.05 * inputs * (2 if scope == "model" else 1)


def test_memory_stays_within_the_budget(models: Path, bucket: Bucket, tmp_path: Path) -> None:
    """From a store to a store in a process of its own, whose libraries count too."""
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_at("s3://models", "model")))
    command = ["merge", str(path), "s3://results/merged", "--quiet", "--memory", "400MiB"]
    subprocess.run([sys.executable, "-m", "streammerge", *command], check=True)

    found = tmp_path / "served" / "results" / "merged" / "streammerge_manifest.json"
    run = json.loads(found.read_bytes())["run"]
    assert 0 < run["measured_memory"] <= run["memory_budget"] == 400 * 2**20
