"""Models on a disk, and the same on servers on loopback."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from models import Models, Tensors
from servers import Server, serving

from streammerge.checkpoint import remote
from streammerge.storage import retrying, stores


def draw(seed: int) -> Tensors:
    """Return a model with tensors of less than a block and one of several."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {f"layers.{i}.w": torch.randn((40, 30), generator=generator) for i in range(6)}
    return {name: tensor.bfloat16() for name, tensor in tensors.items()} | {
        "large": torch.randn((600, 1000), generator=generator)
    }


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
    remote.forget()
    stores.close_stores()


@pytest.fixture
def server(root: Path) -> Iterator[Server]:
    """A web server of the directory, which also speaks as the hub does."""
    with serving(root) as made:
        yield made


def recipe_at(place: str) -> dict[str, object]:
    """Return a recipe of the three models."""
    return {
        "method": "ties",
        "base": f"{place}/base",
        "sources": [{"path": f"{place}/a"}, {"path": f"{place}/b", "weight": 0.5}],
        "parameters": {"density": 0.3},
    }
