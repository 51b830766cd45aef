"""Single files: one in, one out, with what its header says; and an output that is one file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from models import MEMORY, assert_same_model, recipe_of, write_adapter, write_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import streammerge
from streammerge.checkpoint.metadata import read_metadata
from streammerge.checkpoint.reading import read_checkpoint
from streammerge.cli.arguments import main
from streammerge.dtypes import DType
from streammerge.errors import OutputExistsError, RecipeError
from streammerge.plan.layout import plan_layout_like
from streammerge.plan.types import MergePlan
from streammerge.recipe.parsing import parse_recipe
from streammerge.recipe.types import OutputSpec

TENSORS = {"a.weight": torch.arange(12.0).reshape(3, 4), "b.weight": torch.ones(5)}
METADATA = {
    "format": "pt",
    "config": '{"vae": {"z": 4}}',
    "modelspec.title": "A model",
    "modelspec.hash_sha256": "0xabc",
    "sshs_model_hash": "1",
    "sshs_legacy_hash": "2",
    "ss_sd_model_hash": "of the model that training began with",
    "thumbnail": "data:…",
}
KEPT = {"format", "config", "modelspec.title", "ss_sd_model_hash", "thumbnail"}
LEFT_OUT = ("modelspec.hash_sha256", "sshs_legacy_hash", "sshs_model_hash")


class Stored(NamedTuple):
    """What a layout has to know of a tensor."""

    name: str
    dtype: DType
    shape: tuple[int, ...]


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="numpy") as opened:
        return opened.metadata()


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """A base with metadata, and two sources."""
    paths = [tmp_path / f"in-{index}.safetensors" for index in range(3)]
    for index, path in enumerate(paths):
        tensors = {name: tensor + index for name, tensor in TENSORS.items()}
        save_file(tensors, path, metadata=METADATA if index == 0 else {"format": "pt", "mine": "1"})
    return paths


def plan_of(recipe: Any) -> MergePlan:
    planned = streammerge.plan(recipe, memory=MEMORY)
    assert isinstance(planned, MergePlan)
    return planned


def recipe_for(files: list[Path], **document: Any) -> dict[str, Any]:
    return recipe_of("task_arithmetic", files[0], files[1:], **document)


EXPECTED = {name: tensor + 3 for name, tensor in TENSORS.items()}


def test_what_the_base_says_of_itself_is_kept_but_for_digests(
    files: list[Path], tmp_path: Path
) -> None:
    planned = plan_of(recipe_for(files))
    manifest = streammerge.merge(planned, tmp_path / "out")

    found = metadata_of(tmp_path / "out" / "in-0.safetensors")
    assert found == {key: METADATA[key] for key in KEPT}
    assert planned.metadata_left_out == manifest.metadata_left_out == LEFT_OUT
    assert "modelspec.title" in str(planned)
    assert f"{', '.join(LEFT_OUT)} (no longer true)" in str(planned)


def test_without_a_base_it_is_what_the_first_source_says(files: list[Path], tmp_path: Path) -> None:
    streammerge.merge(recipe_of("linear", None, files[1:]), tmp_path / "out", memory=MEMORY)

    found = metadata_of(tmp_path / "out" / "in-1.safetensors")
    assert found == {"format": "pt", "mine": "1"}


def test_of_shards_it_is_what_all_say(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", TENSORS, shards=2)
    for index, shard in enumerate(sorted(base.glob("*.safetensors"))):
        save_file(load_file(shard), shard, metadata={"format": "pt", "of": "all", "n": str(index)})

    planned = plan_of(recipe_of("linear", None, [base]))

    assert dict(planned.layout.shards[0].metadata) == {"format": "pt", "of": "all"}
    assert planned.metadata_left_out == ("n",)


@pytest.mark.parametrize(
    "header",
    [
        # First, as most write it; last; with blanks; with an escape in its name; none; null.
        '{"__metadata__":{"a":"1"},"t":T}',
        '{"t":T,"__metadata__":{"a":"1"}}',
        '  { "__metadata__" : {"a":"1"}, "t":T}',
        '{"t":T,"__met\\u0061data__":{"a":"1"}}',
        '{"__metadata__":null,"t":T}',
        '{"t":T}',
    ],
)
def test_metadata_is_found_wherever_it_stands_in_the_header(header: str, tmp_path: Path) -> None:
    text = header.replace("T", '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}').encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))

    kept, left_out = read_metadata([path])

    expected = {"format": "pt"} | ({"a": "1"} if '"1"' in header else {})
    assert (dict(kept), left_out) == (expected, ())


def test_one_file_stays_one_file_unless_the_recipe_limits_it(
    files: list[Path], tmp_path: Path
) -> None:
    several = write_model(tmp_path / "several", TENSORS, shards=2)
    usual = 5 * 10**9

    def shards(base: Path, numel: int, limit: int | None = None) -> list[str]:
        tensors = [Stored(name, DType.F32, (numel,)) for name in ("a", "b")]
        spec = OutputSpec(dtype=None, max_shard_bytes=limit)
        layout, _ = plan_layout_like(tensors, read_checkpoint(base), spec)
        return [shard.name for shard in layout.shards]

    large = usual // 4
    assert shards(files[0], large) == ["in-0.safetensors"]
    assert shards(files[0], large, limit=usual) == [
        "in-0-00001-of-00002.safetensors",
        "in-0-00002-of-00002.safetensors",
    ]
    assert shards(several, large) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    assert shards(several, 10) == ["model.safetensors"]


def test_an_output_called_safetensors_is_one_file_with_manifest_and_recipe_beside_it(
    files: list[Path], tmp_path: Path
) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "other.safetensors").write_text("mine")
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(recipe_for(files)))

    assert main(["merge", str(recipe), str(folder / "merged.safetensors"), "--quiet"]) == 0

    written = {"merged.safetensors", "merged.manifest.json", "merged.recipe.yaml"}
    assert {path.name for path in folder.iterdir()} == {"other.safetensors", *written}
    assert_same_model(load_file(folder / "merged.safetensors"), EXPECTED)
    assert metadata_of(folder / "merged.safetensors") == {key: METADATA[key] for key in KEPT}
    assert main(["verify", str(folder / "merged.safetensors")]) == 0
    document = json.loads((folder / "merged.manifest.json").read_text())
    assert set(document["files"]) == written - {"merged.manifest.json"}
    again = folder / "again.safetensors"
    assert main(["merge", str(folder / "merged.recipe.yaml"), str(again), "--quiet"]) == 0
    assert again.read_bytes() == (folder / "merged.safetensors").read_bytes()


def test_several_files_become_one_that_is_called_so(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", TENSORS, shards=2)
    (base / "config.json").write_text('{"a": 1}')
    source = write_model(tmp_path / "source", {k: v + 3 for k, v in TENSORS.items()})
    out = tmp_path / "out.safetensors"

    manifest = streammerge.merge(recipe_of("task_arithmetic", base, [source]), out, memory=MEMORY)

    assert_same_model(load_file(out), EXPECTED)
    assert "config.json" in manifest.left_behind
    assert not (tmp_path / "config.json").exists()


def test_a_limit_that_makes_several_files_contradicts_one(
    files: list[Path], tmp_path: Path
) -> None:
    recipe = recipe_for(files, output={"max_shard_size": 48})

    with pytest.raises(
        RecipeError, match=r"48 B makes 2 files of 68 B, and out\.safetensors is one"
    ):
        streammerge.merge(recipe, tmp_path / "out.safetensors", memory=MEMORY)
    assert not list(tmp_path.glob("out*"))


def test_one_file_has_no_companions_to_choose(files: list[Path], tmp_path: Path) -> None:
    (files[1].parent / "config.json").write_text("{}")
    recipe = recipe_for(files, output={"companions": 0})

    with pytest.raises(RecipeError, match=r"output\.companions: .*out\.safetensors is one file"):
        streammerge.merge(recipe, tmp_path / "out.safetensors", memory=MEMORY)


def test_damage_to_one_file_is_found(files: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    streammerge.merge(recipe_for(files), out, memory=MEMORY)
    raw = bytearray(out.read_bytes())
    raw[-1] ^= 1
    out.write_bytes(raw)
    (tmp_path / "out.recipe.yaml").unlink()

    found = streammerge.verify_files(out)

    assert {(d.name, d.kind) for d in found.damages} == {
        ("out.safetensors", "corrupt"),
        ("out.recipe.yaml", "missing"),
    }


def test_one_file_can_be_merged_again_and_compared(files: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    streammerge.merge(recipe_for(files), out, memory=MEMORY)

    found = streammerge.verify_against(recipe_for(files), out, fraction=1, memory=MEMORY)

    assert not found.differing
    assert found.tensors == 2


def test_resume_finds_one_file_complete_and_overwrite_replaces_it(
    files: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "out.safetensors"
    recipe = recipe_for(files)
    streammerge.merge(recipe, out, memory=MEMORY)
    written = out.stat().st_ino

    with pytest.raises(
        OutputExistsError, match=r"out\.safetensors already there; give --overwrite"
    ):
        streammerge.merge(recipe, out, memory=MEMORY)
    streammerge.merge(recipe, out, memory=MEMORY, resume=True)
    assert out.stat().st_ino == written
    streammerge.merge(recipe, out, memory=MEMORY, overwrite=True)
    assert out.stat().st_ino != written
    assert not [
        path for path in tmp_path.iterdir() if path.name.endswith((".partial", ".replaced"))
    ]


@pytest.mark.parametrize("name", ["out.safetensors", "out.manifest.json", "out.recipe.yaml"])
@pytest.mark.parametrize("kind", ["file", "directory", "link"])
def test_what_lies_there_and_is_no_merge_of_ours_stays(
    name: str, kind: str, files: list[Path], tmp_path: Path
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    (tmp_path / "elsewhere").write_text("mine")
    if kind == "file":
        (place / name).write_text("mine")
    elif kind == "directory":
        (place / name).mkdir()
    else:
        (place / name).symlink_to(tmp_path / "elsewhere")

    for options in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(streammerge.StreamMergeError, match=name.replace(".", r"\.")):
            streammerge.merge(
                recipe_for(files), place / "out.safetensors", memory=MEMORY, **options
            )
    assert [path.name for path in place.iterdir()] == [name]
    assert (tmp_path / "elsewhere").read_text() == "mine"


def test_a_peft_adapter_cannot_be_one_file(tmp_path: Path) -> None:
    adapters = [
        write_adapter(tmp_path / f"lora-{i}", {"a.weight": (3, 4)}, seed=i) for i in range(2)
    ]

    with pytest.raises(RecipeError, match=r"adapter_config\.json; name a directory"):
        streammerge.merge(
            recipe_of("cat", None, adapters), tmp_path / "out.safetensors", memory=MEMORY
        )


def test_a_file_of_kohyas_naming_can(tmp_path: Path) -> None:
    files = []
    for index in range(2):
        tensors = {
            "lora_unet_a.lora_down.weight": torch.randn(2, 4),
            "lora_unet_a.lora_up.weight": torch.randn(3, 2),
            "lora_unet_a.alpha": torch.tensor(2.0),
        }
        files.append(write_model(tmp_path / f"lora-{index}.safetensors", tensors))
    out = tmp_path / "both.safetensors"

    streammerge.merge(recipe_of("cat", None, files), out, memory=MEMORY)

    up, down = (
        [load_file(f)[f"lora_unet_a.lora_{w}.weight"] for f in files] for w in ("up", "down")
    )
    found = load_file(out)
    product = found["lora_unet_a.lora_up.weight"] @ found["lora_unet_a.lora_down.weight"]
    expected = sum(u @ d for u, d in zip(up, down, strict=True))
    torch.testing.assert_close(product, expected)
    assert not streammerge.verify_files(out).damages


def test_the_recipe_says_a_limit_only_if_it_was_given(files: list[Path]) -> None:
    planned = plan_of(recipe_for(files))
    methods = {"task_arithmetic": ()}

    assert "max_shard_size" not in planned.recipe
    document = planned.recipe.replace("weight", "").replace("parameters: {}\n", "")
    assert parse_recipe(document, origin="again", methods=methods).output.max_shard_bytes is None
