"""A recipe that stands in a command is the recipe that it prints, and makes the same bytes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from models import MEMORY, Models, load_model, write_adapter

import streammerge
from streammerge.cli.arguments import main
from streammerge.cli.wording import parse_source

WEIGHTS = {"layer.weight": (12, 8)}
SOURCES: list[tuple[str, dict[str, Any]]] = [
    ("models/math", {"path": "models/math"}),
    ("models/math:0.6", {"path": "models/math", "weight": 0.6}),
    ("models/math:-1", {"path": "models/math", "weight": -1.0}),
    ("models/math:1e-2", {"path": "models/math", "weight": 0.01}),
    ("org/model@main:.5", {"path": "org/model@main", "weight": 0.5}),
    # No number: part of the name.
    ("models:math", {"path": "models:math"}),
    ("models/math:0,3", {"path": "models/math:0,3"}),
    ("s3://bucket/key", {"path": "s3://bucket/key"}),
    ("C:/models/math:2", {"path": "C:/models/math", "weight": 2.0}),
    ("a,b", {"path": "a,b"}),
    ("a:1,density=0.3", {"path": "a", "weight": 1.0, "density": 0.3}),
    ("a,density=0.3,adapter=b", {"path": "a", "density": 0.3, "adapter": "b"}),
    ("a,b,weight=2", {"path": "a,b", "weight": 2}),
]


@pytest.fixture
def place(models: Models, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a directory with three models and two adapters, which is the current one."""
    monkeypatch.chdir(models.root)
    torch.manual_seed(0)
    for name in ("base", "math", "code"):
        models.write({"layer.weight": torch.randn(12, 8)}, name)
    for seed, name in enumerate(("first", "second")):
        write_adapter(models.root / name, WEIGHTS, seed=seed)
    return models.root


def shown(text: str) -> dict[str, Any]:
    """Return the recipe in what a command prints on standard error."""
    recipe = text[text.index("# the recipe of this command") :].split("\n\n", maxsplit=1)[0]
    found: dict[str, Any] = yaml.safe_load(recipe)
    return found


@pytest.mark.parametrize(("word", "expected"), SOURCES, ids=[word for word, _ in SOURCES])
def test_a_word_is_a_source(word: str, expected: dict[str, Any]) -> None:
    assert parse_source(word) == expected


def test_a_file_may_be_called_like_a_weight(tmp_path: Path) -> None:
    path = tmp_path / "model:0.5"
    path.mkdir()

    assert parse_source(str(path)) == {"path": str(path)}
    assert parse_source(f"{path}:2") == {"path": str(path), "weight": 2.0}


@pytest.mark.parametrize(
    ("word", "says"),
    [
        (":0.5", "names no source"),
        ("a:1,weight=2", "gives weight twice"),
        ("a,density=1,density=2", "gives density twice"),
        ("a,density=", "expected KEY=VALUE"),
        ("a,density=[", "density"),
    ],
)
def test_a_word_that_is_no_source_is_refused(word: str, says: str) -> None:
    with pytest.raises(streammerge.StreamMergeError, match=says):
        parse_source(word)


def test_a_line_makes_the_bytes_of_the_recipe_that_it_prints(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["base", "math:0.6", "code:0.4,density=0.3"]
    line = ["merge", "--method", "ties", "--base", *words, "-p", "density=0.2", "--seed", "3"]
    line += [
        "--dtype",
        "bfloat16",
        "--semantics",
        "mergekit",
        "-p",
        "majority_sign_method=frequency",
    ]

    assert main([*line, "-o", "line", "--save-recipe", "kept.yaml"]) == 0

    recipe = shown(capsys.readouterr().err)
    assert recipe == {
        "method": "ties",
        "base": "base",
        "sources": [
            {"path": "math", "weight": 0.6},
            {"path": "code", "weight": 0.4, "density": 0.3},
        ],
        "parameters": {"density": 0.2, "majority_sign_method": "frequency"},
        "semantics": "mergekit",
        "seed": 3,
        "output": {"dtype": "bfloat16"},
    }
    assert yaml.safe_load(Path("kept.yaml").read_text()) == recipe
    assert main(["merge", "kept.yaml", "file", "--quiet"]) == 0
    assert (
        Path("line/model.safetensors").read_bytes() == Path("file/model.safetensors").read_bytes()
    )


def test_baking_adds_every_adapter_times_its_weight(place: Path) -> None:
    assert main(["bake", "base", "first", "second:0.5", "baked", "--quiet"]) == 0

    recipe = {
        "method": "task_arithmetic",
        "base": "base",
        "sources": [{"path": "first"}, {"path": "second", "weight": 0.5}],
    }
    streammerge.merge(recipe, "expected")
    baked = load_model(place / "baked")["layer.weight"]
    torch.testing.assert_close(
        baked, load_model(place / "expected")["layer.weight"], rtol=0, atol=0
    )
    base = load_model(place / "base")["layer.weight"]
    assert not torch.equal(baked, base)


def test_baking_takes_what_merging_takes(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["bake", "base", "first", "one.safetensors", "--dtype", "float16"]

    assert main([*line, "--memory", MEMORY, "--json"]) == 0
    assert main([*line, "--resume", "--json"]) == 0

    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [each["event"] for each in events if each["event"] != "progress"] == [
        "recipe", "done", "recipe", "complete",
    ]  # fmt: skip
    assert events[0]["recipe"]["output"] == {"dtype": "float16"}
    assert Path("one.safetensors").is_file()


def test_models_are_not_baked(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bake", "base", "first", "math", "baked"]) == 2

    assert "math: is no adapter" in capsys.readouterr().err
    assert not Path("baked").exists()


def test_a_plan_takes_a_line_too(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--method", "linear", "math:0.5", "code:0.5", "--json"]) == 0

    recipe, planned = map(json.loads, capsys.readouterr().out.splitlines())
    assert recipe["recipe"]["method"] == planned["method"] == "linear"


def test_words_may_stand_behind_options(place: Path) -> None:
    Path("recipe.yaml").write_text("{method: linear, sources: [{path: math}, {path: code}]}")

    assert main(["merge", "recipe.yaml", "--memory", MEMORY, "one", "--quiet"]) == 0
    assert main(["merge", "--quiet", "recipe.yaml", "-o", "two"]) == 0
    line = ["merge", "math", "--method", "linear", "code", "--quiet", "-o", "three"]
    assert main(line) == 0

    made = {Path(name, "model.safetensors").read_bytes() for name in ("one", "two", "three")}
    assert len(made) == 1


def test_a_saved_recipe_overwrites_nothing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.yaml").write_text("mine")
    line = ["merge", "--method", "linear", "math", "code", "--quiet"]

    assert main([*line, "-o", "one", "--save-recipe", "mine.yaml"]) == 4
    assert "mine.yaml: is there already" in capsys.readouterr().err
    assert not Path("one").exists()
    assert main([*line, "-o", "one", "--save-recipe", "kept.yaml"]) == 0
    # As a loop does that resumes.
    assert main([*line, "-o", "one", "--save-recipe", "kept.yaml", "--resume"]) == 0
    assert main([*line, "-o", "two", "--save-recipe", "no/such/place.yaml"]) == 1
    assert Path("mine.yaml").read_text() == "mine"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (["merge", "recipe.yaml"], "expected RECIPE OUT, got 'recipe.yaml"),
        (["merge", "recipe.yaml", "one", "two"], "expected RECIPE OUT, got 'recipe.yaml"),
        (["plan", "recipe.yaml", "one"], "expected RECIPE, got 'recipe.yaml one"),
        (["merge", "recipe.yaml", "one", "--base", "base"], "--base: .* no --method"),
        (["merge", "recipe.yaml", "one", "--seed", "0"], "--seed: .* no --method"),
        (["merge", "--method", "linear", "math", "code"], "--output: is missing"),
        (
            ["merge", "--method", "linear", "math", "-o", "one", "--on", "dask", "--report"],
            "--report:",
        ),
        (["merge", "--method", "tise", "math", "-o", "one"], "did you mean"),
        (["merge", "--method", "linear", "math,wieght=1", "-o", "one"], r"sources\[0\].wieght"),
        (["merge", "--method", "linear", "math", "-p", "density", "-o", "one"], "KEY=VALUE"),
    ],
)
def test_what_no_command_means_is_refused(
    line: list[str], says: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(place.iterdir())

    assert main(line) == 2

    said = capsys.readouterr().err
    assert re.search(says, said), said
    assert sorted(place.iterdir()) == before


def test_an_unknown_option_is_still_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["merge", "recipe.yaml", "one", "--memroy", "1GiB"])

    assert ended.value.code == 2
    assert "unrecognized arguments: --memroy" in capsys.readouterr().err
