"""Every command takes what lies in stores, or says by name what to do instead."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from adapters import tiny
from models import assert_same_model, load_model
from results import OUT, fetch, names_in, shards_of
from stored_models import recipe_at

import streammerge
from streammerge.cli.arguments import main
from streammerge.errors import OutputError
from streammerge.storage import copies

pytest.importorskip("boto3")
pytest.importorskip("moto.server")


def upload(client: Any, root: Path) -> str:
    """Put a directory into the store; return its address."""
    for path in root.rglob("*"):
        if path.is_file():
            key = f"inputs/{path.relative_to(root).as_posix()}"
            client.upload_file(str(path), "results", key)
    return "s3://results/inputs"


@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_parts_read_from_a_store(scope: str, bucket: Any, root: Path, tmp_path: Path) -> None:
    recipe = recipe_at(str(root)) | {"parameters": {"density": 0.3, "scope": scope}}
    streammerge.merge(recipe, tmp_path / "local")
    there = recipe_at(upload(bucket, root)) | {"parameters": recipe["parameters"]}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(there))
    out = str(tmp_path / "out")

    for part in (2, 3, 1):
        # As processes of their own, which have copies of headers in other places.
        copies.forget_places()
        assert main(["merge", str(path), out, "--part", f"{part}/3", "--quiet"]) == 0

    assert_same_model(load_model(Path(out)), load_model(tmp_path / "local"))
    assert not streammerge.verify_files(out).damages
    assert (Path(out) / "model.safetensors").read_bytes() == (
        tmp_path / "local" / "model.safetensors"
    ).read_bytes()


def test_a_part_of_inputs_that_changed_is_refused(
    bucket: Any, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = recipe_at(upload(bucket, root))
    path, out = tmp_path / "recipe.yaml", str(tmp_path / "out")
    path.write_text(yaml.safe_dump(there))
    assert main(["merge", str(path), out, "--part", "1/2", "--quiet"]) == 0
    content = bytearray((root / "a" / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (root / "a" / "model.safetensors").write_bytes(content)
    upload(bucket, root)
    copies.forget_places()

    assert main(["merge", str(path), out, "--part", "2/2", "--quiet"]) != 0
    assert "s3://results/inputs/a/model.safetensors" in capsys.readouterr().err


def test_models_in_a_store_are_looked_at_and_compared(
    bucket: Any, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = upload(bucket, root)

    def said(*command: str) -> tuple[int, str]:
        code = main([*command])
        return code, capsys.readouterr().out.replace(place, "INPUTS").replace(str(root), "INPUTS")

    for command in (
        ("inspect", "{}/b"),
        ("diff", "{}/base", "{}/a", "{}/b"),
        ("diff", "{}/a", "{}/a"),
    ):
        here = said(*(each.format(root) for each in command))
        assert said(*(each.format(place) for each in command)) == here
    recipes = []
    for where in (place, str(root)):
        recipes.append(tmp_path / f"{len(recipes)}.yaml")
        recipes[-1].write_text(yaml.safe_dump(recipe_at(where)))
    reports = [said("analyze", str(recipe), "--json") for recipe in recipes]
    assert [code for code, _ in reports] == [0, 0]
    assert json.loads(reports[0][1])["tables"] == json.loads(reports[1][1])["tables"]
    code, plan = said("plan", str(recipes[0]), "--estimate")
    assert code == 0
    # Of the store, not of the disk on which there are copies of headers.
    assert re.search(r"at least \d+\.\d s: the store gives .*/s, the disk writes .*/s", plan)
    assert "the disk reads" in said("plan", str(recipes[1]), "--estimate")[1]
    assert "INPUTS/base" in plan


def test_what_is_baked_and_merged_together_may_lie_there(
    bucket: Any, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny.llama()
    model.save_pretrained(root / "tiny")
    tiny.make_lora(root / "lora", model, seed=1, r=4)
    place = upload(bucket, root)

    def bake(where: str, out: str) -> int:
        return main(["bake", f"{where}/tiny", f"{where}/lora:0.5", out, "--quiet"])

    assert bake(str(root), str(tmp_path / "local")) == 0
    assert bake(place, OUT) == 0
    assert shards_of(fetch(bucket, tmp_path / "fetched")) == shards_of(tmp_path / "local")
    first, second = (tmp_path / name for name in ("first", "second"))
    for where, reads in ((str(root), 1), (place, 2)):
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe_at(where)))
        assert main(["plan", str(path), "--also", str(path)]) == 0
        # The page cache shares what lies on a disk.
        assert (
            f"2 outputs, up to 2 at once; reads of the inputs: {reads}\n" in capsys.readouterr().out
        )
    streammerge.merge_together(
        [(recipe_at(place), first), (recipe_at(place) | {"parameters": {"density": 0.5}}, second)]
    )
    streammerge.merge(recipe_at(str(root)), tmp_path / "alone")
    assert_same_model(load_model(first), load_model(tmp_path / "alone"))


def test_a_chain_of_recipes_reads_from_a_store_and_goes_on(
    bucket: Any, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from streammerge.chaining import running

    def chain(place: str) -> list[dict[str, object]]:
        first = recipe_at(place) | {"name": "first"}
        # Twice a source, so that it is written.
        sources = [{"path": path} for path in ("first", "first", f"{place}/a")]
        return [first, {"method": "linear", "sources": sources}]

    place = upload(bucket, root)
    for name, where in (("here", str(root)), ("there", place)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump_all(chain(where)))
    here, there = (str(tmp_path / f"{name}.yaml") for name in ("here", "there"))
    assert main(["merge", here, str(tmp_path / "local"), "--quiet"]) == 0
    out = tmp_path / "out"
    merges: list[Path] = []
    merge = running.merge

    def cut(planned: Any, place: Path, **options: Any) -> Any:
        if place == out:
            raise OutputError("the power is gone")
        merges.append(place)
        return merge(planned, place, **options)

    command = ["merge", there, str(out), "--quiet"]
    with monkeypatch.context() as patch:
        patch.setattr(running, "merge", cut)
        assert main(command) == OutputError.exit_code
        assert len(merges) == 1
        copies.forget_places()
        assert main([*command, "--resume"]) == OutputError.exit_code
    copies.forget_places()
    assert main([*command, "--resume"]) == 0

    assert_same_model(load_model(out), load_model(tmp_path / "local"))
    before = (out / "streammerge_manifest.json").stat().st_mtime_ns
    copies.forget_places()
    # It is found to be complete, by another process too.
    assert main([*command, "--resume"]) == 0
    assert (out / "streammerge_manifest.json").stat().st_mtime_ns == before


def test_no_result_names_the_copies_of_headers(
    bucket: Any, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tuned = tiny.llama(), tiny.llama()
    model.save_pretrained(root / "tiny")
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.mul_(1.1)
    tuned.save_pretrained(root / "tuned")
    for index in range(2):
        tiny.make_lora(root / f"lora{index}", model, seed=index, r=4)
    place = upload(bucket, root)
    out = tmp_path / "out"
    out.mkdir()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(recipe_at(place)))
    adapters = [f"{place}/lora{index}" for index in range(2)]
    for command in (
        ["merge", str(recipe), str(out / "merged"), "--report"],
        ["merge", "--method", "linear", *adapters, "-o", str(out / "combined")],
        ["bake", f"{place}/tiny", *adapters, str(out / "baked")],
        ["extract", f"{place}/tiny", f"{place}/tuned", str(out / "extracted"), "--rank", "2"],
        ["analyze", str(recipe)],
        ["diff", f"{place}/base", f"{place}/a"],
        ["plan", str(recipe)],
        ["plan", str(recipe), "--json"],
    ):
        code, captured = main(command), capsys.readouterr()
        # Models that differ are told apart by the exit code.
        assert code == (command[0] == "diff"), (command, captured.err)
        if "--json" not in command:
            assert "streammerge-copies-" not in captured.out + captured.err, command
    found = [path for path in out.rglob("*") if path.is_file()]

    assert len(found) > 20
    for path in found:
        assert b"streammerge-copies-" not in path.read_bytes(), path
        assert b"s3:/results" not in path.read_bytes(), path


def test_what_wants_a_disk_says_so(
    bucket: Any, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = upload(bucket, root)
    linear = {"method": "linear", "sources": [{"path": f"{place}/base"}, {"path": f"{place}/a"}]}
    documents = {
        "recipe": [linear],
        "chain": [linear | {"name": "one"}, {"method": "linear", "sources": [{"path": "one"}]}],
        "grid": [recipe_at(place) | {"grid": {"parameters.density": [0.2, 0.4]}}],
    }
    paths = {}
    for name, recipes in documents.items():
        paths[name] = str(tmp_path / f"{name}.yaml")
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump_all(recipes))
    before = names_in(bucket, "")
    elsewhere = str(tmp_path / "other")
    for command in (
        ["merge", paths["chain"], OUT],
        ["merge", paths["grid"], OUT],
        ["merge", paths["recipe"], OUT, "--also", paths["recipe"], elsewhere],
        ["merge", paths["recipe"], elsewhere, "--also", paths["recipe"], OUT],
        ["extract", f"{place}/base", f"{place}/a", OUT, "--rank", "4"],
    ):
        assert main(command) == OutputError.exit_code, command
        said = capsys.readouterr().err
        assert OUT in said, command
        assert "on a disk; name one, and copy it there" in said, command
    assert names_in(bucket, "") == before
    assert not Path(elsewhere).exists()
