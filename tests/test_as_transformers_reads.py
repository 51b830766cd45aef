"""Files that disagree with themselves are read as transformers reads them, or a note tells the difference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Tensors, recipe_of
from safetensors.torch import load_file, save_file

import streammerge
from streammerge.checkpoint.reading import read_checkpoint

transformers = pytest.importorskip("transformers")
# Warnings of transformers and torch are not about what is tested here.
pytestmark = pytest.mark.filterwarnings("ignore")

NORM, UP = "model.norm.weight", "model.layers.0.mlp.up_proj.weight"
FIRST, SECOND = "a.safetensors", "b.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """Make a model of a few thousand parameters."""
    config = transformers.LlamaConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=16,
        tie_word_embeddings=False,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def shard(model: Path, parts: dict[str, Tensors], weight_map: dict[str, str]) -> None:
    (model / "model.safetensors").unlink()
    for name, tensors in parts.items():
        save_file(tensors, model / name, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": weight_map}
    (model / INDEX).write_text(json.dumps(index))


def loaded_by_transformers(model: Path) -> dict[str, Any]:
    return dict(transformers.LlamaForCausalLM.from_pretrained(model).state_dict())


def merged(model: Path, out: Path) -> Tensors:
    """Return what a merge of nothing with the model comes to."""
    streammerge.merge(recipe_of("linear", None, [model]), out)
    return load_file(out / "model.safetensors")


def test_index_and_shards_that_disagree(whole: Path, tmp_path: Path) -> None:
    """A tensor in another shard than the index says, and one that is in none."""
    tensors = load_file(whole / "model.safetensors")
    rest = {name: tensor for name, tensor in tensors.items() if name != UP}
    weight_map = dict.fromkeys(tensors, FIRST) | {NORM: SECOND, "mtp.fc.weight": SECOND}
    shard(whole, {FIRST: rest, SECOND: {UP: tensors[UP]}}, weight_map)

    expected = loaded_by_transformers(whole)
    found = merged(whole, tmp_path / "out")

    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert len(read_checkpoint(whole).notes) == 2


@pytest.mark.parametrize("named", [FIRST, SECOND])
def test_a_tensor_in_two_shards(named: str, whole: Path, tmp_path: Path) -> None:
    """Transformers takes the last one; where the index means another, the note says so."""
    tensors = load_file(whole / "model.safetensors")
    first = {name: tensor for name, tensor in tensors.items() if name != UP}
    copies = {FIRST: torch.full((8,), 10.0), SECOND: torch.full((8,), 20.0)}
    weight_map = dict.fromkeys(tensors, FIRST) | {UP: SECOND, NORM: named}
    parts = {FIRST: first | {NORM: copies[FIRST]}, SECOND: {UP: tensors[UP], NORM: copies[SECOND]}}
    shard(whole, parts, weight_map)

    in_transformers = loaded_by_transformers(whole)[NORM]
    found = merged(whole, tmp_path / "out")[NORM]

    assert torch.equal(in_transformers, copies[SECOND])
    assert torch.equal(found, copies[named])
    told = any("by transformers from another" in note for note in read_checkpoint(whole).notes)
    assert told == (not torch.equal(found, in_transformers))


def test_a_config_with_a_key_twice(whole: Path) -> None:
    text = (whole / "config.json").read_text()
    (whole / "config.json").write_text('{"hidden_size": 99, "rms_norm_eps": 1,' + text.lstrip()[1:])

    checkpoint = read_checkpoint(whole)

    in_transformers = transformers.AutoConfig.from_pretrained(whole)
    assert checkpoint.config is not None
    assert checkpoint.config["hidden_size"] == in_transformers.hidden_size == 8
    assert checkpoint.config["rms_norm_eps"] == in_transformers.rms_norm_eps
    (note,) = checkpoint.notes
    assert note.endswith("hidden_size, rms_norm_eps")
