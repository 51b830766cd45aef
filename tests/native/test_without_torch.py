"""What kernels do alone, without torch in the process: results, conversions, and errors by name."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from covering import Parts, cover, parts_of
from models import (
    BLOCK,
    MEMORY,
    Models,
    Tensors,
    assert_same_model,
    count_sources,
    load_model,
    recipe_of,
    required,
    without_kernels,
    write_adapter,
)
from safetensors.torch import load_file, save_file

import streammerge
from streammerge.errors import NonFiniteError
from streammerge.methods import discover_methods
from streammerge.methods.base import Operand
from streammerge.native.library import load_kernels
from streammerge.plan import kernels
from streammerge.plan.sweeps import programs_of_plan
from streammerge.tiles.program import Op

pytestmark = pytest.mark.skipif(
    load_kernels() is None, reason="no compiler was found at installation"
)
METHODS = discover_methods()
RUNNER = """
import sys
import streammerge as sm
for recipe, out in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
    sm.merge(recipe, out, memory="512MiB")
    if "torch" in sys.modules:
        sys.exit(f"{recipe} has loaded torch")
"""
"""Merges one after the other: to start a process takes longer than to merge."""
HUGE = 3e38
SCOPES = ("tensor", "model")


def draw(sources: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensors]:
    """Return a base and sources of a large tensor and several small ones."""
    generator = torch.Generator().manual_seed(sources)
    shapes = {"large": (BLOCK + 64,), "copied": (192,), **{f"small{i}": (64,) for i in range(5)}}
    return [
        {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
        for _ in range(sources + 1)
    ]


def merge_without_torch(recipes: dict[str, dict[str, Any]], models: Models) -> dict[str, Path]:
    """Merge in one process that never loads torch, and return where the results are."""
    outs = {name: models.root / f"{name} out" for name in recipes}
    paths = []
    for name, recipe in recipes.items():
        file = models.root / f"{name}.yaml"
        file.write_text(yaml.safe_dump(recipe))
        paths += [str(file), str(outs[name])]
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, *paths], capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)
    return outs


@pytest.mark.parametrize("wanted", [2, 5, 17])
def test_usual_merges_do_not_load_torch(wanted: int, models: Models) -> None:
    recipes = {}
    base, *paths = [models.write(tensors) for tensors in draw(wanted)]
    for name, method in METHODS.items():
        recipe = recipe_of(
            name,
            base,
            paths[: count_sources(method, wanted)],
            parameters=required(method),
            rules=[{"tensors": "copied", "copy": "base"}],
            output={"dtype": "float32"},
        )
        (programs,) = programs_of_plan(streammerge.plan(recipe, memory=MEMORY), method)
        # Singular vectors are torch's.
        if programs.work.whole is None:
            recipes[name] = recipe

    outs = merge_without_torch(recipes, models)

    assert len(recipes) >= len(METHODS) - 3
    for name, recipe in recipes.items():
        with without_kernels():
            expected, _ = models.merge(recipe)
        assert_same_model(load_model(outs[name]), expected)


ADAPTED = ("task_arithmetic", "ties", "dare_ties", "breadcrumbs", "sce")
"""Some that take task vectors alone: of no round, one and several, with totals and without."""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_products_of_adapters_do_not_load_torch(dtype: torch.dtype, models: Models) -> None:
    """One changes tensors that the other leaves alone; parts of rows lie at the ends of blocks."""
    shapes = {"large": (701, 430), "wide": (3, BLOCK // 2), "small": (12, 8), "copied": (5, 4)}
    generator = torch.Generator().manual_seed(0)
    drawn = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    base = models.write({f"{name}.weight": each.to(dtype) for name, each in drawn.items()})
    changed = [("large", "wide", "small"), ("large", "small")]
    adapters = [
        write_adapter(
            models.new_output(), {f"{name}.weight": shapes[name] for name in names}, seed=seed
        )
        for seed, names in enumerate(changed)
    ]
    recipes = {}
    for name in ADAPTED:
        weighted = any(spec.name == "weight" for spec in METHODS[name].parameters)
        parameters = dict(required(METHODS[name])) | ({"weight": 0.7} if weighted else {})
        recipes[name] = recipe_of(name, base, adapters, parameters=parameters)

    outs = merge_without_torch(recipes, models)

    for name, recipe in recipes.items():
        with without_kernels():
            expected, _ = models.merge(recipe)
        assert_same_model(load_model(outs[name]), expected)


@pytest.mark.parametrize("value", [float("nan"), HUGE])
@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_what_is_wrong_with_an_adapter_is_named_as_in_the_plain_way(
    method: str, value: float, models: Models
) -> None:
    base = models.write({"w.weight": torch.full((600, 500), 1.0, dtype=torch.float16)})
    adapter = write_adapter(models.new_output(), {"w.weight": (600, 500)}, seed=0)
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.w.lora_B.weight"][7, 1] = value
    save_file(tensors, file)
    recipe = recipe_of(method, base, [adapter], parameters=dict(required(METHODS[method])))
    said = []
    for plain in (False, True):
        with without_kernels() if plain else nullcontext(), pytest.raises(NonFiniteError) as raised:
            models.merge(recipe)
        said.append(str(raised.value))

    assert said[0] == said[1]


def planned(models: Models, drawn: list[Tensors], method: str = "linear", **keys: Any) -> bool:
    """Return whether a plan needs torch."""
    base, *paths = [models.write(tensors) for tensors in drawn]
    return streammerge.plan(recipe_of(method, base, paths, **keys), memory=MEMORY).needs_torch


def test_a_plan_says_what_the_machine_leaves_to_torch(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = [{"a": torch.ones(65)} for _ in range(65)]
    doubles = [{"a": torch.ones(64).double()} for _ in range(3)]
    integers = [tensors | {"ids": torch.arange(3)} for tensors in draw(2)]

    assert not planned(models, draw(2))
    assert not planned(models, many)
    assert not planned(models, integers)
    assert planned(models, doubles)
    assert planned(models, draw(2), compute_dtype="float64")
    assert planned(models, draw(2), non_finite="keep")
    assert planned(models, draw(2), output={"dtype": "float64"})
    monkeypatch.setattr(kernels, "load_kernels", lambda: None)
    assert planned(models, draw(2))


def _value(source: int, tensor: str, element: int, value: float) -> Callable[[list[Tensors]], Any]:
    """Return what sets one element of one model."""

    def spoil(drawn: list[Tensors]) -> None:
        drawn[source][tensor][element] = value

    return spoil


def _far_apart(drawn: list[Tensors]) -> None:
    drawn[0]["large"][5], drawn[-1]["large"][5] = HUGE, -HUGE


FAULTS = {
    "nan": (_value(1, "large", BLOCK + 3, float("nan")), r"sources\[0\] .* nan at element \["),
    "infinity in the base": (_value(0, "large", 7, float("-inf")), r"base .* holds -inf at"),
    "in one of several small ones": (
        _value(-1, "small3", 9, float("inf")),
        r"small3: sources\[(0|1|4)\] .* holds inf at element \[9\]",
    ),
    "too far from the base": (_far_apart, r"large: the difference to the base overflows at"),
    "too large a result": (
        lambda drawn: [tensors["small1"].fill_(2e5) for tensors in drawn],
        r"small1: the merged value 2\S+ at element \[0\] exceeds 65504",
    ),
}


def takes_no_base(method: str) -> bool:
    return METHODS[method].operand is Operand.WEIGHTS


def parameters_of(method: str, scope: str) -> dict[str, Any]:
    """Return what a method needs, with a density and a scope if it takes them."""
    known = {spec.name for spec in METHODS[method].parameters}
    given = {"scope": scope, "density": 0.5}
    return required(METHODS[method]) | {n: value for n, value in given.items() if n in known}


def parts(case: tuple[str, str]) -> Parts:
    method, scope = case
    return parts_of(method, parameters_of(method, scope), has_base=not takes_no_base(method))


def cases() -> Iterator[Any]:
    """Yield methods and scopes with a fault and a number of sources: each step with all of these."""
    for baseless in (False, True):
        asked = [
            (name, scope)
            for name, method in METHODS.items()
            for scope in SCOPES
            if scope == "tensor" or "scope" in {spec.name for spec in method.parameters}
            if takes_no_base(name) is baseless
        ]
        # Values without a base are merged whatever the base holds.
        faults = [fault for fault in FAULTS if not (baseless and fault == "infinity in the base")]
        for case, kind in cover(asked, list(itertools.product(faults, (2, 5))), parts):
            yield pytest.param(*case, *kind, id="-".join(map(str, (*case, *kind))))


@pytest.mark.parametrize(("method", "scope", "fault", "sources"), cases())
def test_what_is_wrong_is_named_in_the_words_of_the_plain_way(
    method: str, scope: str, fault: str, sources: int, models: Models
) -> None:
    spoil, message = FAULTS[fault]
    drawn = draw(count_sources(METHODS[method], sources), torch.float32)
    spoil(drawn)
    base, *paths = [models.write(tensors) for tensors in drawn]
    recipe = recipe_of(
        method,
        base,
        paths,
        parameters=parameters_of(method, scope),
        rules=[{"tensors": "copied", "copy": "base"}],
        output={"dtype": "float16"},
    )
    (programs,) = programs_of_plan(streammerge.plan(recipe, memory=MEMORY), METHODS[method])
    if fault == "too far from the base" and not programs.merge.uses(Op.TASK_VECTOR):
        message = r"the merged value|overflows"
    with without_kernels(), pytest.raises(NonFiniteError) as plain:
        models.merge(recipe)

    with pytest.raises(NonFiniteError, match=message) as refused:
        models.merge(recipe)

    assert str(refused.value) == str(plain.value)


WITHOUT = """
import importlib.metadata, sys
sys.modules["torch"] = None
version = importlib.metadata.version
def hide(name):
    if name == "torch":
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)
importlib.metadata.version = hide
from streammerge.cli.arguments import main
sys.exit(main(sys.argv[1:]))
"""
"""The command line where torch is not installed."""


def run_without(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT, *arguments], capture_output=True, text=True, check=False
    )


def test_what_takes_no_torch_does_not_miss_it(models: Models) -> None:
    """From the plan to the comparison of a sample, with the same bytes."""
    paths = [models.write(tensors) for tensors in draw(2)]
    base, *sources = map(str, paths)
    recipe = recipe_of("ties", paths[0], paths[1:], parameters={"density": 0.3})
    line = ["--method", "ties", "--base", base, *sources, "-p", "density=0.3"]
    merged, expected = models.root / "merged", models.root / "expected"
    (models.root / "recipe.yaml").write_text(yaml.safe_dump(recipe))

    for command in (
        ["plan", *line],
        ["merge", *line, "-o", str(merged)],
        ["verify", str(merged), "--against", str(models.root / "recipe.yaml")],
        ["inspect", base],
        ["methods", "iso_c"],
        ["doctor", "--no-probe"],
    ):
        done = run_without(*command)
        assert done.returncode == 0, done.stderr

    streammerge.merge(recipe, expected, memory=MEMORY)
    assert_same_model(load_model(merged), load_model(expected))


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        ({"method": "iso_c"}, "the method decomposes whole matrices; that needs torch"),
        ({"compute_dtype": "float64"}, "compute_dtype: float64; that needs torch"),
        ({"non_finite": "keep"}, "non_finite: keep; that needs torch"),
        (
            {"output": {"dtype": "float64"}},
            "7 tensors, copied the first, are stored as F64; that needs torch",
        ),
    ],
)
def test_what_needs_torch_says_so_by_name(
    recipe: dict[str, Any], says: str, models: Models
) -> None:
    base, *sources = [models.write(tensors) for tensors in draw(2)]
    asked = recipe_of("task_arithmetic", base, sources) | recipe
    (models.root / "recipe.yaml").write_text(yaml.safe_dump(asked))
    out = models.root / "out"

    done = run_without("merge", str(models.root / "recipe.yaml"), str(out))

    assert done.returncode == 1
    assert done.stderr == f"DependencyError: {says}, which is not installed: pip install torch\n"
    assert not out.exists()


def test_combining_adapters_says_that_it_needs_torch(models: Models) -> None:
    paths = [models.root / name for name in ("first", "second")]
    for seed, path in enumerate(paths):
        write_adapter(path, {"layer.weight": (12, 8)}, seed=seed)

    done = run_without("merge", "--method", "cat", *map(str, paths), "-o", str(models.root / "out"))

    assert done.returncode == 1
    assert "that needs torch, which is not installed: pip install torch" in done.stderr
