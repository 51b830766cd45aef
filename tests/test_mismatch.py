"""Tensors whose shapes differ along one dimension: the common part merges, the rest stays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import streammerge as sm
from streammerge.checkpoint.outputdir import OutputDirectory
from streammerge.checkpoint.verifying import verify_files
from streammerge.errors import OutputError, ShapeMismatchError
from streammerge.run import verify_against
from tests.models import assert_same_bits

Tensors = dict[str, Tensor]


def write(path: Path, tensors: Tensors, **config: Any) -> Path:
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"tie_word_embeddings": False, **config}))
    return path


def made(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def narrow(tensor: Tensor, axis: int, size: int) -> Tensor:
    return tensor.narrow(axis, 0, size).contiguous()


def merge(out: Path, base: Path | None, sources: list[Path], method: str, **more: Any) -> Tensors:
    recipe: dict[str, Any] = {
        "method": method,
        "sources": [{"path": str(path)} for path in sources],
        "seed": 4,
        "rules": [{"tensors": "x", "mismatch": "common"}],
        **more,
    }
    if base is not None:
        recipe["base"] = str(base)
    sm.merge(recipe, out, memory="2GiB")
    assert not verify_files(out).damages
    assert not verify_against(recipe, out, fraction=1.0, memory="2GiB").differing
    return load_file(out / "model.safetensors")


METHODS: dict[str, dict[str, Any]] = {
    "task_arithmetic": {"weight": 0.7},
    "ties": {"density": 0.3},
    "dare_linear": {"density": 0.4},
    "linear": {},
}
SHAPES = {
    "rows": ((700, 300), 0, 650),
    "columns": ((300, 700), 1, 512),
    "channels": ((320, 9, 3, 3), 1, 4),
    "positions": ((1, 577, 300), 1, 197),
    "inner": ((30, 40, 170), 2, 101),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", SHAPES)
def test_the_common_part_is_merged_as_a_tensor_of_its_own(
    kind: str, method: str, tmp_path: Path
) -> None:
    shape, axis, common = SHAPES[kind]
    base, one, two = (made(*shape, seed=seed) for seed in range(3))
    other = made(70_000, seed=9)
    models = [{"x": base, "y": other}, {"x": narrow(one, axis, common), "y": other + 1}]
    models += [{"x": two, "y": other - 0.5}]
    parts = [{"x": narrow(model["x"], axis, common), "y": model["y"]} for model in models]
    paths = [write(tmp_path / f"m{index}", model) for index, model in enumerate(models)]
    small = [write(tmp_path / f"p{index}", model) for index, model in enumerate(parts)]
    parameters = {"parameters": METHODS[method]}

    got = merge(tmp_path / "out", paths[0], paths[1:], method, **parameters)
    expected = merge(tmp_path / "expected", small[0], small[1:], method, **parameters)

    assert got["x"].shape == shape
    assert_same_bits(narrow(got["x"], axis, common), expected["x"])
    rest = got["x"].narrow(axis, common, shape[axis] - common).contiguous()
    assert_same_bits(rest, base.narrow(axis, common, shape[axis] - common).contiguous())
    assert_same_bits(got["y"], expected["y"])


def test_a_source_that_is_larger_than_the_base_lends_the_rest(tmp_path: Path) -> None:
    """A model that paints over a mask, from one that does not."""
    base, source = made(16, 4, 3, 3, seed=0), made(16, 9, 3, 3, seed=1)
    settings = {"_class_name": "UNet2DConditionModel"}
    first = write(tmp_path / "base", {"conv_in.weight": base}, in_channels=4, **settings)
    second = write(tmp_path / "tuned", {"conv_in.weight": source}, in_channels=9, **settings)
    asked = {"rules": [], "mismatch": "common", "output": {"dtype": "bfloat16"}}

    got = merge(tmp_path / "out", first, [second], "task_arithmetic", **asked)["conv_in.weight"]

    assert_same_bits(narrow(got, 1, 4), (base + (narrow(source, 1, 4) - base)).bfloat16())
    assert_same_bits(got[:, 4:].contiguous(), source[:, 4:].contiguous().bfloat16())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["in_channels"] == 9


def test_a_padded_vocabulary_and_the_plan_that_says_so(tmp_path: Path) -> None:
    sizes = {"base": 64, "tuned": 60}
    paths = [
        write(
            tmp_path / name,
            {
                "model.embed_tokens.weight": made(size, 8, seed=1),
                "lm_head.weight": made(size, 8, seed=2),
            },
            vocab_size=size,
        )
        for name, size in sizes.items()
    ]
    recipe = {
        "method": "task_arithmetic",
        "base": str(paths[0]),
        "sources": [{"path": str(paths[1])}],
        "mismatch": "common",
    }
    manifest = sm.merge(recipe, tmp_path / "out")

    notes = [note.text for note in manifest.notes if note.topic == "common part"]
    assert len(notes) == 2
    assert notes[0].startswith("lm_head.weight: 60 of 64 along dimension 0 merged, the rest")
    assert all(text in str(sm.plan(recipe)) for text in notes)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 64


@pytest.mark.parametrize("damaged", [False, True])
def test_kept_pieces_of_parts_are_checked_when_a_merge_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, damaged: bool
) -> None:
    shape, axis, common = SHAPES["columns"]
    base = write(tmp_path / "base", {"x": made(*shape, seed=0)})
    source = write(tmp_path / "tuned", {"x": narrow(made(*shape, seed=1), axis, common)})
    asked = {"parameters": {"density": 0.3}}
    whole = merge(tmp_path / "whole", base, [source], "ties", **asked)
    recipe = {
        "method": "ties",
        "base": str(base),
        "sources": [{"path": str(source)}],
        "seed": 4,
        "rules": [{"tensors": "x", "mismatch": "common"}],
        **asked,
    }

    def fail(_: OutputDirectory) -> None:
        raise OutputError("no name for the output today")

    with monkeypatch.context() as patched:
        patched.setattr(OutputDirectory, "publish", fail)
        with pytest.raises(OutputError, match="no name"):
            sm.merge(recipe, tmp_path / "out", memory="2GiB")
    if damaged:
        with (tmp_path / "out.partial" / "model.safetensors").open("r+b") as stream:
            stream.seek(-5, 2)
            byte = stream.read(1)
            stream.seek(-5, 2)
            stream.write(bytes([byte[0] ^ 1]))
    manifest = sm.merge(recipe, tmp_path / "out", memory="2GiB", resume=True)

    assert manifest.run.resumed
    assert manifest.run.damaged == damaged
    assert_same_bits(load_file(tmp_path / "out" / "model.safetensors")["x"], whole["x"])


@pytest.mark.parametrize("shapes", [((4, 6), (5, 7)), ((4, 6), (24,))])
def test_shapes_that_differ_in_more_than_one_dimension_are_refused(
    shapes: tuple[tuple[int, ...], ...], tmp_path: Path
) -> None:
    base, source = (
        write(tmp_path / str(index), {"x": torch.zeros(shape)})
        for index, shape in enumerate(shapes)
    )
    with pytest.raises(ShapeMismatchError, match="copy: base"):
        merge(tmp_path / "out", base, [source], "task_arithmetic")


def test_models_of_other_sizes_get_no_rules_that_would_not_help(tmp_path: Path) -> None:
    base, source = (
        write(
            tmp_path / str(size),
            {f"layers.{index}.weight": torch.zeros(size, 8) for index in range(12)},
        )
        for size in (16, 24)
    )
    with pytest.raises(ShapeMismatchError, match="models of other sizes") as caught:
        merge(tmp_path / "out", base, [source], "task_arithmetic", rules=[])
    assert "mismatch: common" not in str(caught.value)
    assert "rules:" not in str(caught.value)
