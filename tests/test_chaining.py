"""Several recipes in one file give what each by itself gives, one after the other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import Models, Tensors, assert_same_model, load_model, write_adapter

import streammerge
from streammerge.chaining import running
from streammerge.chaining.foreseeing import plan_chain
from streammerge.chaining.running import merge_chain
from streammerge.chaining.stages import Chain, read_recipes
from streammerge.cli.arguments import main
from streammerge.errors import OutputExistsError, RecipeError, ShapeMismatchError
from streammerge.run import merge

CHAIN = """
name: arc
merge_method: slerp
base_model: {a}
models: [{{model: {b}}}]
parameters: {{t: [0.2, 0.8]}}
---
name: sum
method: task_arithmetic
base: {a}
sources: [{{path: arc, weight: 0.5}}, {{path: {c}}}]
---
method: ties
base: {a}
sources: [{{path: sum}}, {{path: arc}}]
parameters: {{density: 0.5}}
"""


def draw(seed: int, rows: int = 40) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    tensors = {"embed.weight": torch.randn((rows, 24), generator=generator)}
    for layer in range(3):
        tensors[f"layers.{layer}.w.weight"] = torch.randn((24, 24), generator=generator)
    return tensors


@pytest.fixture
def paths(models: Models) -> dict[str, Path]:
    made = {name: models.write(draw(seed), name) for seed, name in enumerate("abc")}
    for path in made.values():
        (path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 40}))
    return made


@pytest.fixture
def write(tmp_path: Path, paths: dict[str, Path]) -> Callable[[str], Path]:
    def make(text: str) -> Path:
        recipe = tmp_path / "chain.yml"
        recipe.write_text(text.format(**paths))
        return recipe

    return make


Write = Callable[[str], Path]


def chain_of(path: Path) -> Chain:
    chain = read_recipes(path, download=False)
    assert isinstance(chain, Chain)
    return chain


def one_by_one(text: str, paths: dict[str, Path], directory: Path) -> Tensors:
    """Merge each recipe by itself, with the results of earlier ones under their names."""
    directory.mkdir()
    documents = text.format(**paths).split("---")
    results = {name: directory / name for name in ("arc", "sum", "result")}
    for document, out in zip(documents, results.values(), strict=True):
        recipe = directory / "recipe.yaml"
        alone = document.replace("name: arc\n", "").replace("name: sum\n", "")
        for name, folder in results.items():
            alone = alone.replace(f"path: {name}", f"path: {folder}")
        recipe.write_text(alone)
        streammerge.merge(recipe, out)
    return load_model(out)


def test_the_last_result_is_that_of_each_recipe_by_itself(
    write: Write, paths: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"

    assert main(["merge", str(write(CHAIN)), str(out), "--quiet"]) == 0

    assert_same_model(load_model(out), one_by_one(CHAIN, paths, tmp_path / "alone"))
    assert not (tmp_path / "out.stages").exists()
    assert not streammerge.verify_files(out).damages
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 40
    notes = json.loads((out / "streammerge_manifest.json").read_text())["notes"]
    texts = [note["text"] for note in notes if note["topic"] == "chain"]
    assert texts[:2] == [
        "arc is slerp of an earlier recipe, removed",
        "sum is task_arithmetic of an earlier recipe, computed while it was read",
    ]
    assert texts[2].startswith("recipes and inputs: SHA-256 ")


def test_the_recipe_beside_the_result_makes_it_again(write: Write, tmp_path: Path) -> None:
    out, again = tmp_path / "out", tmp_path / "again"
    assert main(["merge", str(write(CHAIN)), str(out), "--quiet"]) == 0
    beside = out / "streammerge_recipe.yaml"

    assert main(["merge", str(beside), str(again), "--quiet"]) == 0

    assert_same_model(load_model(again), load_model(out))
    assert (again / beside.name).read_bytes() == beside.read_bytes()
    assert "path: arc" in (out / "README.md").read_text()
    document = json.loads((out / "streammerge_manifest.json").read_text())
    assert document["recipe"] == beside.read_text()
    assert ".stages" not in document["recipe"]


def test_what_takes_one_recipe_says_what_takes_several(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["merge", str(write(CHAIN)), str(out), "--quiet"]) == 0

    assert main(["verify", str(out), "--against", str(write(CHAIN))]) == 2

    assert "has 3 recipes, of which later ones merge" in capsys.readouterr().err
    with pytest.raises(RecipeError, match="has 3 recipes"):
        streammerge.plan(write(CHAIN))


def test_a_name_that_is_none_is_named(write: Write) -> None:
    slip = CHAIN.replace("path: sum}", "path: summ}")

    with pytest.raises(RecipeError, match='merges "sum", and "summ" is neither a name nor here'):
        read_recipes(write(slip), download=False)


def test_all_are_planned_before_the_first_one_runs(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(CHAIN)

    assert main(["plan", str(path)]) == 0

    said = capsys.readouterr().out
    assert [line for line in said.splitlines() if line.startswith("==")] == [
        "== arc ==",
        "== sum ==",
        "== result ==",
    ]
    assert "sources[1]   arc" in said
    plans = plan_chain(chain_of(path))
    assert [planned.method for planned in plans] == ["slerp", "task_arithmetic", "ties"]
    assert {entry.name for entry in tmp_path.iterdir()} == {"a", "b", "c", "chain.yml"}


def test_what_is_wrong_with_the_last_one_is_said_before_the_first_one_runs(
    write: Write, models: Models, tmp_path: Path
) -> None:
    models.write(draw(9, rows=50), "wider")
    path = write(
        CHAIN
        + "---\nmethod: linear\nsources: [{{path: sum}}, {{path: %s}}]\n" % (tmp_path / "wider")
    )
    path.write_text(path.read_text().replace("---\nmethod: ties", "---\nname: last\nmethod: ties"))
    path.write_text(path.read_text().replace("{path: sum}, {path: /", "{path: last}, {path: /"))

    with pytest.raises(ShapeMismatchError) as caught:
        merge_chain(chain_of(path), tmp_path / "out")

    assert "in the recipe named result" in caught.value.__notes__
    assert not (tmp_path / "out.stages").exists()


def test_a_chain_that_is_cut_off_goes_on_where_it_stopped(
    write: Write, paths: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = write(CHAIN), tmp_path / "out"
    merged: list[str] = []

    def cut(planned, place, **options):
        merged.append(place.name)
        if len(merged) == 2:
            raise KeyboardInterrupt
        return merge(planned, place, **options)

    monkeypatch.setattr(running, "merge", cut)
    with pytest.raises(KeyboardInterrupt):
        merge_chain(chain_of(path), out)
    monkeypatch.undo()
    before = (tmp_path / "out.stages" / "arc" / "model.safetensors").stat().st_mtime_ns

    with pytest.raises(OutputExistsError, match="--resume goes on with it"):
        merge_chain(chain_of(path), out)
    states = []

    def watch(planned, place, **options):
        states.append((tmp_path / "out.stages" / "arc" / "model.safetensors").stat().st_mtime_ns)
        return merge(planned, place, **options)

    monkeypatch.setattr(running, "merge", watch)
    merge_chain(chain_of(path), out, resume=True)

    assert set(states) == {before}
    assert_same_model(load_model(out), one_by_one(CHAIN, paths, tmp_path / "alone"))


def test_results_of_other_recipes_are_not_taken_for_those_of_these(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(running, "merge", cut)
    with pytest.raises(KeyboardInterrupt):
        merge_chain(chain_of(write(CHAIN)), tmp_path / "out")
    monkeypatch.undo()
    changed = chain_of(write(CHAIN.replace("0.8", "0.9")))

    with pytest.raises(OutputExistsError, match="results of other recipes"):
        merge_chain(changed, tmp_path / "out", resume=True)
    merge_chain(changed, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out.stages").exists()


def test_a_directory_of_somebody_else_is_left_alone(write: Write, tmp_path: Path) -> None:
    (tmp_path / "out.stages").mkdir()
    (tmp_path / "out.stages" / "mine").write_text("precious")

    for options in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(OutputExistsError, match="holds no results of recipes"):
            merge_chain(chain_of(write(CHAIN)), tmp_path / "out", **options)
    assert (tmp_path / "out.stages" / "mine").read_text() == "precious"


def test_an_earlier_result_may_be_the_base_and_bear_an_adapter(
    write: Write, paths: dict[str, Path], tmp_path: Path
) -> None:
    adapter = write_adapter(tmp_path / "lora", {"layers.1.w.weight": (24, 24)}, seed=5)
    text = (
        "name: mean\nmethod: linear\nsources: [{{path: {a}}}, {{path: {b}}}]\n---\n"
        f"method: linear\nsources: [{{{{path: mean, adapter: '{adapter}'}}}}, {{{{path: mean}}}}]\n"
    )
    merge_chain(chain_of(write(text)), tmp_path / "out")

    merged = load_model(tmp_path / "out")
    a, b = (load_model(paths[name]) for name in "ab")
    for name in ("embed.weight", "layers.0.w.weight"):
        torch.testing.assert_close(merged[name], (a[name] + b[name]) / 2)
    assert not torch.allclose(
        merged["layers.1.w.weight"], (a["layers.1.w.weight"] + b["layers.1.w.weight"]) / 2
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "method: linear\nsources: [{{path: {a}}}]\n---\n3\n",
            "document 1 of 2: name: expected a name",
        ),
        (
            "name: x\nmethod: linear\nsources: [{{path: {a}}}]\n---\n3\n",
            "document 2 of 2: expected a",
        ),
        (
            (
                "name: ../x\nmethod: linear\nsources: [{{path: {a}}}]\n---\nmethod: linear\n"
                "sources: [{{path: ../x}}]\n"
            ),
            "letters, digits and -_",
        ),
        (
            (
                "name: x\nmethod: linear\nsources: [{{path: {a}}}]\n---\nmethod: linear\n"
                "sources: [{{path: {b}}}]\n"
            ),
            'no later recipe merges "x"',
        ),
        (
            (
                "name: x\nmethod: linear\nsources: [{{path: {a}}}]\n---\nname: x\nmethod: linear\n"
                "sources: [{{path: x}}]\n"
            ),
            '"x" is the name of an earlier recipe',
        ),
        (
            (
                "name: x\nmethod: linear\nsources: [{{path: {a}, wieght: 1}}]\n---\nmethod: linear\n"
                "sources: [{{path: x}}]\n"
            ),
            'document 1 of 2: sources[0].wieght: unknown key; did you mean "weight"?',
        ),
    ],
)
def test_recipes_that_are_not_named_as_they_should_be_are_refused(
    text: str, said: str, write: Write
) -> None:
    with pytest.raises(RecipeError) as caught:
        read_recipes(write(text), download=False)
    assert said in str(caught.value)


def test_resuming_what_is_done_does_nothing(write: Write, tmp_path: Path) -> None:
    path, out = str(write(CHAIN)), tmp_path / "out"
    assert main(["merge", path, str(out), "--quiet"]) == 0
    before = (out / "model.safetensors").stat().st_mtime_ns

    assert main(["merge", path, str(out), "--quiet", "--resume"]) == 0

    assert (out / "model.safetensors").stat().st_mtime_ns == before
    assert not (tmp_path / "out.stages").exists()
    assert main(["merge", path, str(out), "--quiet"]) == 4
    assert not (tmp_path / "out.stages").exists()


def test_no_stages_input_is_written_to(
    write: Write, paths: dict[str, Path], tmp_path: Path
) -> None:
    streammerge.merge(
        {"method": "linear", "sources": [{"path": str(paths["c"])}]}, tmp_path / "own"
    )
    text = (
        "name: first\nmethod: linear\nsources: [{{path: {a}}}, {{path: %s}}]\n---\n"
        "method: linear\nsources: [{{path: first}}, {{path: {b}}}]\n" % (tmp_path / "own")
    )
    before = (tmp_path / "own" / "model.safetensors").read_bytes()

    with pytest.raises(OutputExistsError, match="overlaps the input"):
        merge_chain(chain_of(write(text)), tmp_path / "own", overwrite=True)

    assert (tmp_path / "own" / "model.safetensors").read_bytes() == before
    assert not (tmp_path / "own.stages").exists()


def test_what_a_kill_leaves_at_any_moment_is_known(write: Write, tmp_path: Path) -> None:
    """An empty directory is one whose mark is not there yet, or is gone already."""
    (tmp_path / "out.stages").mkdir()
    path = write(CHAIN)
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))

    merge_chain(chain_of(path), tmp_path / "out")

    assert not (tmp_path / "out.stages").exists()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "next.stages").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputExistsError, match="holds no results of recipes"):
        merge_chain(chain_of(path), tmp_path / "next", overwrite=True)


def test_recipes_with_carriage_returns_resume(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(CHAIN)
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))

    def cut(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(running, "merge", cut)
    with pytest.raises(KeyboardInterrupt):
        merge_chain(chain_of(path), tmp_path / "out")
    monkeypatch.undo()

    merge_chain(chain_of(path), tmp_path / "out", resume=True)

    assert load_model(tmp_path / "out")


def test_a_chain_is_converted_recipe_by_recipe(
    write: Write, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = write(CHAIN + "---\n")
    assert main(["convert", str(path)]) == 0
    converted = tmp_path / "native.yml"
    converted.write_text(capsys.readouterr().out)

    found, native = chain_of(path), chain_of(converted)

    assert [stage.recipe for stage in native.stages] == [stage.recipe for stage in found.stages]
