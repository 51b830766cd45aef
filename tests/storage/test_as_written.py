"""What the documentation tells people to type about stores works as it is written there."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from models import assert_same_model, load_model
from servers import serving
from stored_models import recipe_at

import streammerge

boto3 = pytest.importorskip("boto3")
moto = pytest.importorskip("moto.server")

PAGE = Path(__file__).resolve().parents[2] / "docs/howto/object-stores.md"


def test_the_commands_of_the_page_merge_what_lies_in_stores(root: Path, tmp_path: Path) -> None:
    text = PAGE.read_text(encoding="utf-8")
    commands = [line for line in text.splitlines() if line.startswith("streammerge ")]
    assert commands[0].startswith("streammerge merge --method ties --base s3://")
    assert "-o s3://results/merged" in commands[1]
    assert "--part 2/2" in commands[-1]
    linear = {"method": "linear", "sources": [{"path": str(root / name)} for name in ("base", "a")]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(linear))
    keys = {
        "AWS_ACCESS_KEY_ID": "AKIAEXAMPLE",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
    }
    store = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    store.start()
    host, port = store.get_host_and_port()
    # What the hub has at its root is a model.
    shutil.copytree(root / "a", tmp_path / "hub")
    try:
        client = boto3.client(
            "s3",
            endpoint_url=f"http://{host}:{port}",
            region_name="us-east-1",
            aws_access_key_id=keys["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=keys["AWS_SECRET_ACCESS_KEY"],
        )
        client.create_bucket(Bucket="models")
        client.create_bucket(Bucket="results")
        for name, key in (("base", "base"), ("b", "other")):
            for path in (root / name).iterdir():
                client.upload_file(str(path), "models", f"{key}/{path.name}")
        with serving(tmp_path / "hub") as hub:
            places = {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "HF_ENDPOINT": hub.address}
            places["STREAMMERGE_SCRATCH"] = str(tmp_path / "scratch")
            for command in commands:
                subprocess.run(
                    [sys.executable, "-m", *shlex.split(command)],
                    cwd=tmp_path,
                    env=os.environ | keys | places,
                    check=True,
                )
    finally:
        store.stop()

    recipe = recipe_at(str(root)) | {"parameters": {"density": 0.2}}
    recipe["sources"] = [{"path": str(root / "a"), "weight": 0.5}, {"path": str(root / "b")}]
    streammerge.merge(recipe, tmp_path / "local")
    assert_same_model(load_model(tmp_path / "merged"), load_model(tmp_path / "local"))
