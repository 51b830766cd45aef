"""Models on a disk, and the same on servers on loopback."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Models
from results import names_in
from servers import Server, serving
from stored_models import draw

from streammerge.checkpoint.scratch import SCRATCH_VARIABLE
from streammerge.storage import copies, retrying, stores, targets


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A directory with a base and two models, one of them in shards."""
    (tmp_path / "root").mkdir()
    models = Models(tmp_path / "root")
    for seed, name in enumerate(("base", "a", "b")):
        path = models.write(draw(seed), name, shards=3 if name == "b" else 1)
        (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
        (path / "tokenizer_config.json").write_text("{}")
    return tmp_path / "root"


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nobody wait, and nothing be remembered of an earlier test."""
    monkeypatch.setattr(retrying, "_FIRST_PAUSE_SECONDS", 0.001)
    copies.forget_places()
    stores.close_stores()


@pytest.fixture
def server(root: Path) -> Iterator[Server]:
    """A web server of the directory, which also speaks as the hub does."""
    with serving(root) as made:
        yield made


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The address of a server that speaks S3."""
    moto = pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A client of the bucket for results, empty before and after."""
    boto3 = pytest.importorskip("boto3")
    for name, value in {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "AKIAEXAMPLE",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        SCRATCH_VARIABLE: str(tmp_path / "scratch"),
    }.items():
        monkeypatch.setenv(name, value)
    # Parts that stores take are at least 5 MiB, but for the last one.
    monkeypatch.setattr(targets, "SMALLEST_PART", 5 * 2**20)
    client = boto3.client("s3")
    client.create_bucket(Bucket="results")
    yield client
    for each in client.list_multipart_uploads(Bucket="results").get("Uploads", ()):
        client.abort_multipart_upload(Bucket="results", Key=each["Key"], UploadId=each["UploadId"])
    for name in names_in(client, ""):
        client.delete_object(Bucket="results", Key=name)
    client.delete_bucket(Bucket="results")


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """Models of some 20 MiB in two shards, so that there are parts."""
    (tmp_path / "large").mkdir()
    models = Models(tmp_path / "large")
    for seed, name in enumerate(("base", "a", "b")):
        generator = torch.Generator().manual_seed(seed)
        tensors = {f"layers.{i}.w": torch.randn((900, 1000), generator=generator) for i in range(6)}
        path = models.write(tensors, name, shards=2)
        (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return tmp_path / "large"
