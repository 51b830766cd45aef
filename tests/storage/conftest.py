"""Models on a disk, and the same on servers on loopback."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from models import Models
from servers import Server, serving
from stored_models import draw

from streammerge.storage import copies, retrying, stores


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
