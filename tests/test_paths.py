"""Whatever of the library takes a path takes it as text, as a ``Path``, or as what stands for text."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from models import MEMORY, Models, recipe_of, write_model

import streammerge
from streammerge.checkpoint.inputs import parse_path


@dataclass(frozen=True)
class Location:
    """A path of somebody else's making."""

    path: Any

    def __fspath__(self) -> Any:
        return self.path


KINDS = {"str": str, "Path": Path, "PathLike": lambda path: Location(str(path))}
BYTES = {
    "bytes": os.fsencode,
    "PathLike of bytes": lambda path: Location(os.fsencode(path)),
    "number": lambda _: 3,
}
Convert = Callable[[Path], Any]


@pytest.fixture
def root(models: Models) -> Path:
    """Return a directory with a model, a recipe for it, and its result."""
    model = models.write({"a": torch.arange(6.0)}, "model")
    recipe = recipe_of("linear", None, [model, models.write({"a": torch.ones(6)}, "other")])
    (models.root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    streammerge.merge(recipe, models.root / "merged", memory=MEMORY)
    report = streammerge.analyze(recipe, memory=MEMORY)
    (models.root / "report.json").write_text(report.as_json())
    return models.root


def merge(root: Path, convert: Convert) -> object:
    recipe, new = convert(root / "recipe.yaml"), convert(root / "new")
    streammerge.merge(recipe, new, memory=MEMORY)
    streammerge.merge(recipe, new, memory=MEMORY, resume=True)
    return streammerge.merge(recipe, new, memory=MEMORY, overwrite=True).method


def merge_part(root: Path, convert: Convert) -> object:
    recipe, new = convert(root / "recipe.yaml"), convert(root / "new")
    return [
        each and each.method
        for part in (2, 1, 1)
        for each in [streammerge.merge_part(recipe, new, part=part, parts=2, memory=MEMORY)]
    ]


def merge_together(root: Path, convert: Convert) -> object:
    merges = [(convert(root / "recipe.yaml"), convert(root / name)) for name in ("new", "newer")]
    return [each.method for each in streammerge.merge_together(merges, memory=MEMORY)]


def plan_together(root: Path, convert: Convert) -> object:
    recipes = [convert(root / "recipe.yaml")] * 2
    groups = streammerge.plan_together(recipes, memory=MEMORY)
    return [planned.method for group in groups for planned in group.plans]


def render_page(root: Path, convert: Convert) -> object:
    report = streammerge.read_report(convert(root / "report.json"))
    pytest.importorskip("vl_convert", reason="pip install 'streammerge[report]'")
    return streammerge.render_page(report)[:15]


def verify_against(root: Path, convert: Convert) -> object:
    recipe, merged = convert(root / "recipe.yaml"), convert(root / "merged")
    return streammerge.verify_against(recipe, merged, memory=MEMORY, fraction=1.0).differing


def extract(root: Path, convert: Convert) -> object:
    for name, factor in (("before", 1.0), ("after", 2.0)):
        write_model(root / name, {"layer.weight": factor * torch.ones(3, 4)})
    base, tuned, new = (convert(root / name) for name in ("before", "after", "extracted"))
    return streammerge.extract(base, tuned, new, rank=1, memory=MEMORY).method


CALLS: dict[str, tuple[Callable[[Path, Convert], object], object]] = {
    "analyze": (
        lambda root, convert: streammerge.analyze(
            convert(root / "recipe.yaml"), memory=MEMORY
        ).document["method"],
        "linear",
    ),
    "diff": (
        lambda root, convert: streammerge.diff(
            [convert(root / "model"), convert(root / "other")], memory=MEMORY
        ).document["changed"],
        ["a"],
    ),
    "extract": (extract, "extract"),
    "load_recipe": (
        lambda root, convert: streammerge.load_recipe(convert(root / "recipe.yaml")).method,
        "linear",
    ),
    "merge": (merge, "linear"),
    "merge_part": (merge_part, [None, "linear", "linear"]),
    "merge_together": (merge_together, ["linear", "linear"]),
    "plan_together": (plan_together, ["linear", "linear"]),
    "plan": (
        lambda root, convert: streammerge.plan(convert(root / "recipe.yaml"), memory=MEMORY).method,
        "linear",
    ),
    "read_checkpoint": (
        lambda root, convert: list(streammerge.read_checkpoint(convert(root / "model")).tensors),
        ["a"],
    ),
    "read_report": (
        lambda root, convert: streammerge.read_report(convert(root / "report.json")).document[
            "kind"
        ],
        "analysis",
    ),
    "read_status": (
        lambda root, convert: streammerge.read_status(convert(root / "merged")).complete,
        True,
    ),
    "render_page": (render_page, "<!doctype html>"),
    "verify_against": (verify_against, ()),
    "verify_files": (
        lambda root, convert: streammerge.verify_files(convert(root / "merged")).damages,
        (),
    ),
}
"""Every public function that takes a path, and what it comes to."""


def test_every_public_function_is_tried() -> None:
    public = {name: getattr(streammerge, name) for name in streammerge.__all__}

    assert {name for name, each in public.items() if inspect.isfunction(each)} == set(CALLS)


def test_no_method_of_a_public_class_takes_a_path() -> None:
    classes = [getattr(streammerge, name) for name in streammerge.__all__]
    methods = [
        (each.__name__, name)
        for each in classes
        if inspect.isclass(each)
        for name, method in inspect.getmembers(each, inspect.isfunction)
        if not name.startswith("_") and "Path" in str(inspect.signature(method))
    ]

    assert methods == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CALLS)
def test_a_path_may_be_text_or_stand_for_it(name: str, kind: str, root: Path) -> None:
    call, expected = CALLS[name]

    assert call(root, KINDS[kind]) == expected


@pytest.mark.parametrize("kind", BYTES)
@pytest.mark.parametrize("name", CALLS)
def test_what_is_no_text_is_refused_by_the_name_of_the_argument(
    name: str, kind: str, root: Path
) -> None:
    call, _ = CALLS[name]
    says = r"^(recipe|out|path|directory): expected a path as str or os\.PathLike\[str\], got .*"

    with pytest.raises(TypeError, match=says):
        call(root, BYTES[kind])


@pytest.mark.parametrize("kind", BYTES)
def test_an_output_that_is_no_text_is_refused_before_anything_is_read(
    kind: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)
    before = sorted(path.name for path in root.iterdir())

    with pytest.raises(TypeError, match=r"^out: expected a path"):
        streammerge.merge("no such recipe", BYTES[kind](root / "new"))
    with pytest.raises(TypeError, match=r"^out: expected a path"):
        streammerge.verify_against("no such recipe", BYTES[kind](root / "merged"))

    assert sorted(path.name for path in root.iterdir()) == before


def test_what_is_refused_is_shown_shortly() -> None:
    with pytest.raises(TypeError) as caught:
        parse_path(b"a" * 10_000, "path")  # type: ignore[arg-type]

    assert len(str(caught.value)) < 250
