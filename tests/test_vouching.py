"""`verify` passes nothing but what was written: no flipped bit, no link, no pipe, nothing extra."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import MEMORY, Models, date_back, recipe_of

import streammerge
from streammerge.checkpoint.outputform import MANIFEST_NAME
from streammerge.cli.arguments import main
from streammerge.errors import CheckpointError, HeaderError, OutputExistsError

pytestmark = pytest.mark.timeout(3600)


@pytest.fixture
def out(models: Models, tmp_path: Path) -> Path:
    """A merge in several shards, with an index, a configuration and a folder."""
    tensors = {
        "a": torch.arange(200.0),
        "b": torch.ones(40),
        "c": torch.zeros(3, dtype=torch.int64),
    }
    inputs = [models.write(tensors, f"in-{index}") for index in range(2)]
    (inputs[0] / "config.json").write_text("{}")
    (inputs[0] / "additional_chat_templates").mkdir()
    (inputs[0] / "additional_chat_templates" / "tool.jinja").write_text("{{ tool }}")
    recipe = recipe_of("ties", inputs[0], inputs, parameters={"density": 0.4})
    recipe["output"] = {"max_shard_size": "900B"}
    streammerge.merge(recipe, tmp_path / "out", memory=MEMORY)
    return tmp_path / "out"


def passes(out: Path) -> bool:
    try:
        return not streammerge.verify_files(out).damages
    except CheckpointError:
        return False


def test_no_flipped_bit_passes(out: Path, request: pytest.FixtureRequest) -> None:
    assert passes(out)
    chance = random.Random(1)  # noqa: S311 - it only chooses bits
    step = 1 if request.config.getoption("--runslow") else 61
    flipped = 0
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        whole = path.read_bytes()
        for byte in range(chance.randrange(step), len(whole), step):
            damaged = bytearray(whole)
            damaged[byte] ^= 1 << chance.randrange(8)
            path.write_bytes(damaged)
            assert not passes(out), (path.name, byte, damaged[byte])
            flipped += 1
        path.write_bytes(whole)
    assert passes(out)
    assert flipped > 50


@pytest.mark.parametrize("change", ["shorter", "longer", "gone", "empty"])
def test_no_file_of_another_length_passes(change: str, out: Path) -> None:
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        whole = path.read_bytes()
        if change == "gone":
            path.unlink()
        else:
            path.write_bytes({"shorter": whole[:-1], "longer": whole + b"\n", "empty": b""}[change])
        assert not passes(out), path
        path.write_bytes(whole)
    assert passes(out)


def test_two_files_that_changed_places_do_not_pass(out: Path) -> None:
    first, second = sorted(out.glob("*.safetensors"))[:2]
    first.rename(out / "aside")
    second.rename(first)
    (out / "aside").rename(second)

    assert not passes(out)


@pytest.mark.parametrize(
    ("pattern", "instead"),
    [
        (r'"method": "ties"', '"method": "dare"'),
        (r"seed: 0", "seed: 1"),
        (r'"version": 3', '"version": 4'),
        (r'"streammerge": "', '"streammerge": "9'),
        (r'"resumed": false', '"resumed": true'),
        (r'"digest": "[0-9a-f]{64}"\n}\n$', '"digest": "' + "0" * 64 + '"\n}\n'),
        (r',\n "digest": "[0-9a-f]{64}"\n}\n$', "\n}\n"),
        (r"\n}\n$", "\n}\n\n"),
    ],
)
def test_an_edited_manifest_does_not_pass_and_is_not_trusted(
    pattern: str, instead: str, out: Path
) -> None:
    manifest = out / MANIFEST_NAME
    text = manifest.read_text()
    edited = re.sub(pattern, instead, text, count=1)
    assert edited != text
    manifest.write_text(edited)

    (damage,) = streammerge.verify_files(out).damages

    assert (damage.name, damage.kind) == (MANIFEST_NAME, "corrupt")
    assert "digest" in damage.what
    assert main(["verify", str(out)]) == 1
    recipe = json.loads(text)["recipe"]
    (out.parent / "recipe.yaml").write_text(recipe)
    with pytest.raises((HeaderError, OutputExistsError)):
        streammerge.merge(out.parent / "recipe.yaml", out, memory=MEMORY, overwrite=True)


def test_the_digest_can_be_checked_with_public_tools(out: Path) -> None:
    """As the manifest's module says: SHA-256 of the file with zeros in its place."""
    raw = (out / MANIFEST_NAME).read_bytes()
    said = json.loads(raw)["digest"]
    assert raw.count(said.encode()) == 1

    assert hashlib.sha256(raw.replace(said.encode(), b"0" * 64)).hexdigest() == said


def test_a_manifest_of_before_is_read_and_cannot_vouch_for_itself(
    out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = json.loads((out / MANIFEST_NAME).read_text())
    date_back(out, document, hashlib.sha256)
    del document["digest"]
    (out / MANIFEST_NAME).write_text(json.dumps(document | {"version": 1}))

    assert main(["verify", str(out)]) == 0
    assert "no digest of its own" in capsys.readouterr().out


def _link(path: Path) -> None:
    path.symlink_to(path.with_name(path.name + ".aside"))


def _bind(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(path))


KINDS: dict[str, Callable[[Path], None]] = {
    "a symbolic link": _link,
    "a named pipe": os.mkfifo,
    "a folder": Path.mkdir,
    "a socket": _bind,
}


@pytest.mark.skipif(os.name != "posix", reason="kinds of files are those of POSIX")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["README.md", "model-00001-of-00002.safetensors", "config.json"])
def test_a_listed_file_must_be_a_regular_file(
    kind: str, name: str, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A link leads to the very bytes that were written, and a pipe waits for ever."""
    (out / name).rename(out / f"{name}.aside")
    monkeypatch.chdir(out)
    KINDS[kind](Path(name))

    damages = {each.name: each for each in streammerge.verify_files(out).damages}

    assert damages[name].kind == "corrupt"
    assert damages[name].what.startswith(f"is {kind}")


@pytest.mark.skipif(os.name != "posix", reason="kinds of files are those of POSIX")
@pytest.mark.parametrize("kind", KINDS)
def test_the_manifest_must_be_a_regular_file(
    kind: str, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (out / MANIFEST_NAME).rename(out / f"{MANIFEST_NAME}.aside")
    monkeypatch.chdir(out)
    KINDS[kind](Path(MANIFEST_NAME))

    with pytest.raises(CheckpointError, match=MANIFEST_NAME):
        streammerge.verify_files(out)


def test_a_folder_that_became_a_link_is_named(out: Path) -> None:
    (out / "additional_chat_templates").rename(out.parent / "elsewhere")
    (out / "additional_chat_templates").symlink_to(out.parent / "elsewhere")

    names = {(each.name, each.kind) for each in streammerge.verify_files(out).damages}

    assert ("additional_chat_templates/tool.jinja", "corrupt") in names


@pytest.mark.skipif(os.name != "posix", reason="kinds of files are those of POSIX")
def test_what_the_manifest_does_not_list_is_named_whatever_it_is(out: Path) -> None:
    (out / "empty" / "deeper").mkdir(parents=True)
    os.mkfifo(out / "pipe")
    (out / "link").symlink_to("README.md")
    (out / "full").mkdir()
    (out / "full" / "file").touch()

    extra = {each.name: each.kind for each in streammerge.verify_files(out).damages}

    assert extra == dict.fromkeys(["empty/deeper", "pipe", "link", "full/file"], "extra")


def test_a_name_that_cannot_be_printed_is_refused_in_a_manifest(out: Path) -> None:
    document = json.loads((out / MANIFEST_NAME).read_text())
    document["files"]["a\x1b[2Jb"] = document["files"]["README.md"]
    (out / MANIFEST_NAME).write_text(json.dumps(document))

    with pytest.raises(HeaderError, match=r"a\\x1b\[2Jb.*cannot be printed") as caught:
        streammerge.verify_files(out)
    assert str(caught.value).isprintable()


class OwnPath:
    """A path that is neither text nor a pathlib.Path."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __fspath__(self) -> str:
        return str(self._path)


@pytest.mark.parametrize("kind", [str, Path, OwnPath])
def test_every_public_function_takes_any_path(
    kind: Callable[[Path], str | os.PathLike[str]], out: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.loads((out / MANIFEST_NAME).read_text())["recipe"])

    assert streammerge.load_recipe(kind(recipe)).method == "ties"
    assert streammerge.plan(kind(recipe), memory=MEMORY).method == "ties"
    streammerge.merge(kind(recipe), kind(tmp_path / "again"), memory=MEMORY)
    assert not streammerge.verify_files(kind(tmp_path / "again")).damages
    compared = streammerge.verify_against(kind(recipe), kind(out), fraction=1.0, memory=MEMORY)
    assert not compared.differing
    assert len(streammerge.read_checkpoint(kind(out)).tensors) == 3
