"""Models on the hub are read without a local copy."""

from __future__ import annotations

from pathlib import Path

import pytest
from models import assert_same_model, load_model
from servers import COMMIT, Server
from stored_models import recipe_at

import streammerge
from streammerge.errors import CheckpointError


@pytest.fixture(autouse=True)
def hub(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let huggingface_hub ask our server."""
    import huggingface_hub

    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        server.address + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setenv("HF_TOKEN", "hf_secret")


def test_bytes_are_those_of_a_disk(root: Path, server: Server, tmp_path: Path) -> None:
    streammerge.merge(recipe_at(str(root)), tmp_path / "local")

    manifest = streammerge.merge(recipe_at("hf://org/model"), tmp_path / "out")

    assert_same_model(load_model(tmp_path / "out"), load_model(tmp_path / "local"))
    # The branch is recorded as the commit that it was.
    first = manifest.inputs[0].remote
    assert first is not None
    assert first.url == f"hf://org/model@{COMMIT}/base/model.safetensors"
    assert first.version == COMMIT
    for path in (tmp_path / "out").iterdir():
        assert b"hf_secret" not in path.read_bytes()
    ranges = {
        given
        for (path, _), given in zip(server.requests, server.authorisations, strict=True)
        if "/resolve/" in path
    }
    assert ranges == {"Bearer hf_secret"}


def test_the_token_stays_with_the_hub(server: Server, tmp_path: Path) -> None:
    server.elsewhere = True
    streammerge.merge(recipe_at("hf://org/model@main"), tmp_path / "out")

    given = dict(zip((path for path, _ in server.requests), server.authorisations, strict=True))
    moved = [each for path, each in given.items() if path.startswith("/moved/")]
    assert moved
    assert set(moved) == {None}


def test_a_revision_and_a_folder_may_be_named(root: Path, tmp_path: Path) -> None:
    found = streammerge.plan(
        {"method": "linear", "sources": [{"path": f"hf://org/model@{COMMIT}/b"}]}
    )

    assert [file.origin for file in found.files] == [
        f"hf://org/model@{COMMIT}/b/model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)
    ]


def test_a_model_that_is_not_there_is_said() -> None:
    with pytest.raises(CheckpointError, match="hf://org/missing: cannot be found") as caught:
        streammerge.plan({"method": "linear", "sources": [{"path": "hf://org/missing"}]})

    assert "hf_secret" not in str(caught.value)
