"""Recipes that name models of the hub: found, merged, recorded with their commits, and portable."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from models import Models, assert_same_model, load_model, recipe_of, write_adapter, write_model

import streammerge
from streammerge.checkpoint.outputform import MANIFEST_NAME, RECIPE_NAME
from streammerge.cli.arguments import main
from streammerge.errors import CheckpointError, OutputExistsError

COMMIT, LATER = "0123456789abcdef" * 2 + "01234567", "f" * 40
TENSORS = {"a.weight": torch.arange(12.0).reshape(3, 4), "b.weight": torch.ones(5)}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a cache with two models and an adapter, and a working directory without any."""
    cache = tmp_path / "home" / "someone" / "cache"
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    for name, shift in (("base", 0.0), ("tuned", 1.0)):
        root = cache / f"models--org--{name}"
        write_model(root / "snapshots" / COMMIT, {n: t + shift for n, t in TENSORS.items()})
        (root / "refs").mkdir()
        (root / "refs" / "main").write_text(COMMIT)
        (root / "refs" / "v1").write_text(COMMIT)
    for name in ("one", "two"):
        root = cache / f"models--org--{name}"
        write_adapter(root / "snapshots" / COMMIT, {"a.weight": (3, 4)}, seed=len(name))
        (root / "refs").mkdir()
        (root / "refs" / "main").write_text(COMMIT)
    return cache


def recipe(base: str, source: str) -> dict[str, object]:
    return {"method": "task_arithmetic", "base": base, "sources": [{"path": source, "weight": 0.5}]}


def test_names_merge_as_their_paths_do(cache: Path, tmp_path: Path) -> None:
    paths = [cache / f"models--org--{name}" / "snapshots" / COMMIT for name in ("base", "tuned")]

    streammerge.merge(recipe("org/base", "org/tuned@v1"), tmp_path / "named")
    streammerge.merge(recipe(str(paths[0]), str(paths[1])), tmp_path / "paths")

    assert_same_model(load_model(tmp_path / "named"), load_model(tmp_path / "paths"))
    expected = {name: tensor + 0.5 for name, tensor in TENSORS.items()}
    assert_same_model(load_model(tmp_path / "named"), expected)


def test_plan_and_manifest_say_which_commits(cache: Path, tmp_path: Path) -> None:
    asked = recipe("org/base", "org/tuned@0123456")

    planned = streammerge.plan(asked)
    streammerge.merge(planned, tmp_path / "out")

    lines = str(planned).splitlines()
    assert f"base         org/base@{COMMIT}, {cache}/models--org--base/snapshots/{COMMIT}" in lines
    manifest = json.loads((tmp_path / "out" / MANIFEST_NAME).read_text())
    assert manifest["revisions"] == {
        "base": f"org/base@{COMMIT}",
        "sources[0]": f"org/tuned@{COMMIT}",
    }


def test_the_recipe_that_is_kept_names_no_folder_of_this_machine(
    cache: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"

    streammerge.merge(recipe("org/base", "org/tuned@v1"), out)

    kept = yaml.safe_load((out / RECIPE_NAME).read_text())
    assert (kept["base"], kept["sources"][0]["path"]) == ("org/base", "org/tuned@v1")
    card = (out / "README.md").read_text()
    assert "base_model:\n- org/base\n- org/tuned\n" in card
    assert "someone" not in card
    assert main(["verify", str(out), "--against", str(out / RECIPE_NAME), "--quiet"]) == 0


def test_another_commit_is_another_merge(cache: Path, tmp_path: Path) -> None:
    """A resume does not go on with another state of a branch."""
    asked = recipe("org/base", "org/tuned")
    streammerge.merge(asked, tmp_path / "out")
    root = cache / "models--org--tuned"
    write_model(root / "snapshots" / LATER, {n: t + 3 for n, t in TENSORS.items()})
    (root / "refs" / "main").write_text(LATER)

    with pytest.raises(OutputExistsError):
        streammerge.merge(asked, tmp_path / "out", resume=True)


def test_adapters_of_the_hub_are_baked_and_combined(cache: Path, tmp_path: Path) -> None:
    snapshots = {
        name: cache / f"models--org--{name}" / "snapshots" / COMMIT for name in ("one", "two")
    }

    streammerge.merge(recipe("org/base", "org/one"), tmp_path / "baked")
    streammerge.merge(recipe("org/base", str(snapshots["one"])), tmp_path / "baked2")
    combination = {"method": "linear", "sources": [{"path": "org/one"}, {"path": "org/two"}]}
    streammerge.merge(combination, tmp_path / "combined")
    combination["sources"] = [{"path": str(path)} for path in snapshots.values()]
    streammerge.merge(combination, tmp_path / "combined2")

    assert_same_model(load_model(tmp_path / "baked"), load_model(tmp_path / "baked2"))
    name = "adapter_model.safetensors"
    assert (tmp_path / "combined" / name).read_bytes() == (
        tmp_path / "combined2" / name
    ).read_bytes()
    manifest = json.loads((tmp_path / "combined" / MANIFEST_NAME).read_text())
    assert manifest["revisions"] == {
        "sources[0]": f"org/one@{COMMIT}",
        "sources[1]": f"org/two@{COMMIT}",
    }
    assert "someone" not in (tmp_path / "combined" / "README.md").read_text()


def test_a_missing_model_is_named_with_its_place_in_the_recipe(cache: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        streammerge.plan(recipe("org/base", "org/none"))

    assert "hf download org/none" in str(caught.value)
    assert caught.value.__notes__ == ["while reading sources[0] of the recipe"]


def test_inspect_knows_names_of_the_hub(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "org/tuned@v1"]) == 0
    assert f"org/tuned@{COMMIT}" in capsys.readouterr().out

    assert main(["inspect", "org/one"]) == 0


def test_planning_does_not_import_huggingface_hub(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe("org/base", "org/tuned")))
    code = (
        "import sys; from streammerge.cli.arguments import main; assert main(sys.argv[1:]) == 0; "
        "assert 'huggingface_hub' not in sys.modules"
    )

    subprocess.run([sys.executable, "-c", code, "plan", str(tmp_path / "recipe.yaml")], check=True)


def test_a_download_is_for_those_who_ask(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A combination of adapters has to know what its sources are before its method is looked up."""
    fetched = []

    class HfApi:
        def model_info(self, repository: str, *, revision: str | None) -> object:
            names = ("adapter_config.json", "adapter_model.safetensors")
            fetched.append(repository)
            return type(
                "Info", (), {"siblings": [type("File", (), {"rfilename": n}) for n in names]}
            )

    def snapshot_download(*, repo_id: str, **_: object) -> str:
        path = cache / f"models--org--{repo_id.partition('/')[2]}" / "snapshots" / COMMIT
        write_adapter(path, {"a.weight": (3, 4)}, seed=9)
        (path.parents[1] / "refs").mkdir()
        (path.parents[1] / "refs" / "main").write_text(COMMIT)
        return str(path)

    module = type(sys)("huggingface_hub")
    module.HfApi, module.snapshot_download = HfApi, snapshot_download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    (tmp_path / "r.yaml").write_text(
        yaml.safe_dump({"method": "cat", "sources": [{"path": "org/one"}, {"path": "org/new"}]})
    )

    assert main(["plan", str(tmp_path / "r.yaml")]) == 2
    assert fetched == []
    assert main(["plan", str(tmp_path / "r.yaml"), "--download"]) == 0
    assert fetched == ["org/new"]


def test_a_tilde_in_a_recipe_is_home(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = models.write(TENSORS)
    monkeypatch.setenv("HOME", str(path.parent))

    planned = streammerge.plan(recipe_of("linear", None, [Path("~") / path.name]))

    assert planned.models[0].path == str(path)
    assert f"~/{path.name}" in planned.recipe
