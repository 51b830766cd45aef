"""Outputs are called what the loaders of their bases look for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from models import MEMORY, recipe_of, write_model
from safetensors.torch import save_file

import streammerge
from streammerge.checkpoint.modelcard import find_library
from streammerge.checkpoint.naming import name_weights
from streammerge.checkpoint.types import Checkpoint, ShardFile


def checkpoint(*names: str, index: str | None = None) -> Checkpoint:
    files = tuple(ShardFile(Path("/models/base") / name, 1, 0, "") for name in names)
    return Checkpoint(Path("/models/base"), files, {}, None, index_name=index)


@pytest.mark.parametrize(
    ("names", "index", "single", "second_of_three", "new_index"),
    [
        # transformers, alone and in shards, and its variant.
        (["model.safetensors"], None, "model.safetensors", "model-00002-of-00003.safetensors", "model.safetensors.index.json"),
        (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"], "model.safetensors.index.json", "model.safetensors", "model-00002-of-00003.safetensors", "model.safetensors.index.json"),
        (["model.fp16-00001-of-00001.safetensors"], "model.safetensors.index.fp16.json", "model.fp16.safetensors", "model.fp16-00002-of-00003.safetensors", "model.safetensors.index.fp16.json"),
        # diffusers; once it put the variant behind the count.
        (["diffusion_pytorch_model.safetensors"], None, "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model-00002-of-00003.safetensors", "diffusion_pytorch_model.safetensors.index.json"),
        (["diffusion_pytorch_model.fp16.safetensors"], None, "diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.fp16-00002-of-00003.safetensors", "diffusion_pytorch_model.safetensors.index.fp16.json"),
        (["diffusion_pytorch_model-00001-of-00001.fp16.safetensors"], "diffusion_pytorch_model.safetensors.index.fp16.json", "diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.fp16-00002-of-00003.safetensors", "diffusion_pytorch_model.safetensors.index.fp16.json"),
        # Mistral's own, open_clip's, and files of people.
        (["consolidated.safetensors"], None, "consolidated.safetensors", "consolidated-00002-of-00003.safetensors", "consolidated.safetensors.index.json"),
        (["open_clip_model.safetensors"], None, "open_clip_model.safetensors", "open_clip_model-00002-of-00003.safetensors", "open_clip_model.safetensors.index.json"),
        (["sd_xl_base_1.0.safetensors"], None, "sd_xl_base_1.0.safetensors", "sd_xl_base_1.0-00002-of-00003.safetensors", "sd_xl_base_1.0.safetensors.index.json"),
        # PyTorch files are found under another name once they are safetensors.
        (["pytorch_model.bin"], None, "model.safetensors", "model-00002-of-00003.safetensors", "model.safetensors.index.json"),
        (["pytorch_model.fp16.bin"], None, "model.fp16.safetensors", "model.fp16-00002-of-00003.safetensors", "model.safetensors.index.fp16.json"),
        (["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"], "pytorch_model.bin.index.json", "model.safetensors", "model-00002-of-00003.safetensors", "model.safetensors.index.json"),
        (["diffusion_pytorch_model.bin"], None, "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model-00002-of-00003.safetensors", "diffusion_pytorch_model.safetensors.index.json"),
        (["open_clip_pytorch_model.bin"], None, "open_clip_model.safetensors", "open_clip_model-00002-of-00003.safetensors", "open_clip_model.safetensors.index.json"),
        (["consolidated.00.pth"], None, "consolidated.safetensors", "consolidated-00002-of-00003.safetensors", "consolidated.safetensors.index.json"),
        # Shards that are not counted, or of several counts, are called after their index.
        (["a.safetensors", "b.safetensors"], "model.safetensors.index.json", "model.safetensors", "model-00002-of-00003.safetensors", "model.safetensors.index.json"),
        (["x-00001-of-00002.safetensors", "y-00001-of-00001.safetensors"], "model.safetensors.index.json", "model.safetensors", "model-00002-of-00003.safetensors", "model.safetensors.index.json"),
        # What no plan may call a file.
        (["a\nb.safetensors"], None, "model.safetensors", "model-00002-of-00003.safetensors", "model.safetensors.index.json"),
        (["a:b.safetensors"], None, "model.safetensors", "model-00002-of-00003.safetensors", "model.safetensors.index.json"),
    ],
)  # fmt: skip
def test_an_output_is_called_what_its_base_is(
    names: list[str], index: str | None, single: str, second_of_three: str, new_index: str
) -> None:
    found = name_weights(checkpoint(*names, index=index))

    assert found.shard(0, 1) == found.single == single
    assert (found.shard(1, 3), found.index) == (second_of_three, new_index)


@pytest.mark.parametrize("name", ["consolidated", "open_clip_model"])
def test_a_directory_with_one_file_keeps_its_name(name: str, tmp_path: Path) -> None:
    inputs = []
    for index in range(2):
        directory = tmp_path / f"in-{index}"
        directory.mkdir()
        save_file({"a": torch.full((4,), float(index))}, directory / f"{name}.safetensors")
        inputs.append(directory)

    streammerge.merge(recipe_of("linear", None, inputs), tmp_path / "out", memory=MEMORY)

    assert (tmp_path / "out" / f"{name}.safetensors").exists()


@pytest.mark.parametrize(
    ("files", "library"),
    [
        ({}, None),
        ({"config.json": {"model_type": "llama"}}, "transformers"),
        ({"config.json": {"_class_name": "UNet2DConditionModel"}}, "diffusers"),
        ({"config.json": {"architecture": "vit", "pretrained_cfg": {}}}, "timm"),
        ({"config.json": {}, "modules.json": []}, "sentence-transformers"),
        ({"open_clip_config.json": {}}, "open_clip"),
        ({"model_index.json": {}}, "diffusers"),
    ],
)
def test_the_library_is_the_one_whose_files_are_there(
    files: dict[str, object], library: str | None, tmp_path: Path
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))

    assert find_library(tmp_path) == library


def test_shards_and_one_file_give_the_same_output(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(5.0), "b": torch.ones(3)}
    one = write_model(tmp_path / "one", tensors)
    several = write_model(tmp_path / "several", tensors, shards=2)

    for base, out in ((one, "out-1"), (several, "out-2")):
        streammerge.merge(recipe_of("linear", None, [base]), tmp_path / out, memory=MEMORY)

    first, second = ((tmp_path / out / "model.safetensors") for out in ("out-1", "out-2"))
    assert first.read_bytes() == second.read_bytes()
