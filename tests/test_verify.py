"""``streammerge verify``: damage is found and named; a model is proved to be what its recipe says."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from blake3 import blake3
from models import MEMORY, Models, date_back, recipe_of

import streammerge
from streammerge.checkpoint.digests import (
    LEAF_ELEMENTS,
    digest_shard,
    leaf_digests,
    tree_digest,
)
from streammerge.checkpoint.header import read_safetensors_header
from streammerge.checkpoint.manifest import is_plain_path
from streammerge.checkpoint.outputform import MANIFEST_NAME
from streammerge.checkpoint.verifying import verify_files
from streammerge.cli.arguments import main
from streammerge.errors import CheckpointError, HeaderError, OutputError
from streammerge.run import verify_against

LARGE = 3 * LEAF_ELEMENTS + 77


@pytest.fixture
def base(models: Models) -> Path:
    path = models.write(draw(1), "base")
    (path / "config.json").write_text("{}")
    return path


@pytest.fixture
def recipe(base: Path, models: Models) -> dict[str, Any]:
    sources = [models.write(draw(seed), f"source-{seed}") for seed in (2, 3)]
    return recipe_of(
        "ties",
        base,
        sources,
        parameters={"density": 0.4},
        output={"max_shard_size": "1MB", "dtype": "bfloat16"},
    )


@pytest.fixture
def out(recipe: dict[str, Any], tmp_path: Path) -> Path:
    streammerge.merge(recipe, tmp_path / "out", memory=MEMORY)
    return tmp_path / "out"


def draw(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"large": (LARGE,), "b": (9, 4), "c": (), "empty": (0, 3)}
    drawn = {name: torch.randn(s, generator=generator) for name, s in shapes.items()}
    return drawn | {"ids": torch.arange(5)}


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def largest_shard(out: Path) -> Path:
    return max(out.glob("*.safetensors"), key=lambda path: path.stat().st_size)


def test_a_fresh_merge_is_as_it_was_written(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = verify_files(out)

    assert found.damages == ()
    listed = {path.name for path in out.iterdir()} - {MANIFEST_NAME}
    assert found.files == len(listed)
    assert found.nbytes == sum((out / name).stat().st_size for name in listed)
    assert main(["verify", str(out)]) == 0
    assert "all as they were written" in capsys.readouterr().out


@pytest.mark.parametrize("position", [9, 400_000, -1])
def test_one_flipped_bit_is_found(
    position: int, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = largest_shard(out)
    flip(shard, position)

    assert main(["verify", str(out)]) == 1

    assert f"corrupt  {shard.name}: " in capsys.readouterr().out


def test_every_kind_of_damage_is_named(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = sorted(out.glob("*.safetensors"))
    shards[0].unlink()
    with shards[1].open("ab") as stream:
        stream.write(b"\0")
    flip(out / "config.json", 0)
    (out / "stray.txt").touch()
    (out / "deep").mkdir()
    (out / "deep" / "stray").touch()

    assert main(["verify", str(out), "--json"]) == 1

    found = json.loads(capsys.readouterr().out)
    assert [(damage["name"], damage["kind"]) for damage in found["damages"]] == [
        ("config.json", "corrupt"),
        (shards[0].name, "missing"),
        (shards[1].name, "corrupt"),
        ("deep/stray", "extra"),
        ("stray.txt", "extra"),
    ]


def test_a_directory_without_a_manifest_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"has no streammerge_manifest\.json, so it is no result"
    ):
        verify_files(base)
    assert main(["verify", str(base)]) == 1
    assert main(["verify", str(tmp_path / "nowhere")]) == 1
    with pytest.raises(CheckpointError, match="no such file or directory"):
        verify_files(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="no such file"):
        verify_files(tmp_path / "nowhere.safetensors")


def test_what_holds_results_and_what_will_be_one_is_said(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "grid").mkdir()
    for name in ("d", "b", "c", "a"):
        streammerge.merge(recipe, tmp_path / "grid" / name, memory=MEMORY)
    streammerge.merge_part(recipe, tmp_path / "parts", part=1, parts=2, memory=MEMORY)

    grid = tmp_path / "grid"
    with pytest.raises(
        CheckpointError,
        match=rf"holds 4 merged model\(s\), {grid}/a, {grid}/b, {grid}/c, {grid}/d;",
    ):
        verify_files(grid)
    with pytest.raises(OutputError, match=rf"but 4 in folders of it; name one, as {grid}/a"):
        streammerge.read_status(grid)
    with pytest.raises(CheckpointError, match=r"is an unfinished merge, in .*parts\.partial; "):
        verify_files(tmp_path / "parts")


@pytest.mark.parametrize(
    "document",
    [
        "[]",
        "{}",
        "{",
        '{"files": {"a": 3}, "recipe_digest": ""}',
        '{"files": {"../a": {"nbytes": 1, "digest": "", "tree": false}}, "recipe_digest": ""}',
        '{"files": {"/a": {"nbytes": 1, "digest": "", "tree": false}}, "recipe_digest": ""}',
        "[" * 100_000,
    ],
)
def test_a_manifest_that_is_none_is_refused(document: str, tmp_path: Path) -> None:
    (tmp_path / MANIFEST_NAME).write_text(document)

    with pytest.raises(HeaderError, match="not a manifest of streammerge"):
        verify_files(tmp_path)


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("model.safetensors", True),
        ("1_Pooling/config.json", True),
        ("..", False),
        ("a/../b", False),
        ("/etc/passwd", False),
        ("a//b", False),
        ("", False),
        ("a\\..\\b", False),
    ],
)
def test_names_stay_below_the_directory(name: str, *, plain: bool) -> None:
    assert is_plain_path(name) == plain


def test_verify_does_not_wait_for_torch(out: Path) -> None:
    script = (
        "import sys\n"
        "from streammerge.cli.arguments import main\n"
        f"code = main(['verify', {str(out)!r}])\n"
        "sys.exit(code or 'torch' in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL)


# -- digests


def test_the_digest_of_a_shard_is_what_its_definition_says(out: Path) -> None:
    shard = largest_shard(out)
    _, entries = read_safetensors_header(shard, file_index=0)
    data = shard.read_bytes()
    start = min(entry.offset for entry in entries)
    tree = blake3(blake3(data[:start]).digest())
    for entry in sorted(entries, key=lambda entry: entry.offset):
        own = data[entry.offset : entry.offset + entry.nbytes]
        step = 262_144 * entry.dtype.itemsize
        for begin in range(0, len(own), step):
            tree.update(blake3(own[begin : begin + step]).digest())

    manifest = json.loads((out / MANIFEST_NAME).read_text())

    assert manifest["files"][shard.name]["digest"] == tree.hexdigest()
    assert digest_shard(shard, entries, start) == tree.hexdigest()


@pytest.mark.parametrize("version", [1, 2, 3])
def test_manifests_of_earlier_versions_are_read_with_their_hash(out: Path, version: int) -> None:
    path = out / MANIFEST_NAME
    document = json.loads(path.read_text())
    written = json.dumps(document["files"])
    date_back(out, document, {1: hashlib.sha256, 2: hashlib.sha256, 3: blake3}[version])
    assert (json.dumps(document["files"]) == written) == (version == 3)
    write_with_digest(path, document | {"version": version})

    assert verify_files(out).damages == ()


def write_with_digest(path: Path, document: dict[str, Any]) -> None:
    """Write a manifest whose last line vouches for it; of version 1, one without."""
    del document["digest"]
    if document["version"] == 1:
        path.write_text(json.dumps(document))
        return
    lines = json.dumps(document, indent=1).removesuffix("\n}")
    raw = f'{lines},\n "digest": "{"0" * 64}"\n}}\n'.encode()
    digest = hashlib.sha256(raw).hexdigest().encode()
    path.write_bytes(raw.replace(b"0" * 64, digest))


def test_leaves_may_be_digested_in_any_cut() -> None:
    data = memoryview(bytes(range(256)) * 40)
    whole = leaf_digests(data, 1024)
    cut = leaf_digests(data[:4096], 1024) + leaf_digests(data[4096:], 1024)
    assert whole == cut
    assert tree_digest(b"h", [whole]) == tree_digest(b"h", [cut[:32], cut[32:]])
    assert leaf_digests(data[:0], 1024) == b""


# -- against the recipe


@pytest.fixture
def recipe_file(recipe: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def forge(shard: Path, element: int) -> None:
    """Change one element of ``large`` and the manifest with it."""
    _, entries = read_safetensors_header(shard, file_index=0)
    large = next(entry for entry in entries if entry.name == "large")
    flip(shard, large.offset + 2 * element)
    manifest = shard.parent / MANIFEST_NAME
    document = json.loads(manifest.read_text())
    date_back(shard.parent, document, hashlib.sha256)
    del document["digest"]
    # A manifest of before, which does not vouch for itself.
    manifest.write_text(json.dumps(document | {"version": 1}))


@pytest.mark.parametrize(
    "options",
    [
        *({"fraction": each} for each in (0, -0.5, 1.5, float("nan"), "x", True)),
        *({"seed": each} for each in ("x", 1.5, True)),
    ],
)
def test_a_sample_that_cannot_be_is_refused_before_any_work(
    options: dict[str, Any], tmp_path: Path
) -> None:
    (name,) = options

    with pytest.raises(ValueError, match=f"^{name}: expected"):
        verify_against(tmp_path / "absent.yaml", tmp_path / "absent", **options)


@pytest.mark.parametrize("fraction", [0.01, 0.5, 1.0])
def test_a_model_is_what_its_recipe_says(
    fraction: float, out: Path, recipe: dict[str, Any]
) -> None:
    for seed in range(3):
        found = verify_against(recipe, out, fraction=fraction, seed=seed, memory=MEMORY)

        assert found.differing == ()
        assert found.tensors >= 1
        if fraction == 1.0:
            assert found.tensors == 5


def test_a_forged_element_is_found_though_all_digests_agree(
    out: Path, recipe_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = next(
        path
        for path in out.glob("*.safetensors")
        if any(e.name == "large" for e in read_safetensors_header(path, file_index=0)[1])
    )
    forge(shard, LARGE - 5)
    assert main(["verify", str(out), "--quiet"]) == 0

    arguments = ["verify", str(out), "--against", str(recipe_file), "--sample", "1"]
    assert main([*arguments, "--memory", MEMORY, "--quiet"]) == 1

    assert f"differs  large: first at flat element {LARGE - 5}" in capsys.readouterr().out


def test_another_recipe_gives_another_model(
    out: Path, recipe: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump(recipe | {"parameters": {"density": 0.41}}))

    command = ["verify", str(out), "--against", str(other), "--sample", "1", "--json"]
    assert main([*command, "--memory", MEMORY]) == 1

    differing = json.loads(capsys.readouterr().out)["against"]["differing"]
    assert "large" in {each["tensor"] for each in differing}


def test_a_model_of_another_layout_is_refused(out: Path, recipe: dict[str, Any]) -> None:
    other = recipe | {"output": {"dtype": "float32", "max_shard_size": "1MB"}}

    with pytest.raises(OutputError, match="result of another one"):
        verify_against(other, out, memory=MEMORY)


@pytest.mark.parametrize("text", ["0", "1.5", "-1", "half"])
def test_a_sample_is_a_fraction(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["verify", "out", "--against", "recipe.yaml", "--sample", text])

    assert caught.value.code == 2
    assert "above 0 and up to 1" in capsys.readouterr().err
