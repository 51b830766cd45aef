"""Recipes that combine adapters: told from those that merge models, and read with their methods."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from streammerge.adapters.combining.combinations import COMBINATIONS
from streammerge.adapters.files.components import read_named
from streammerge.adapters.files.reading import is_adapter
from streammerge.adapters.files.types import Adapter
from streammerge.checkpoint.hub import locate_model
from streammerge.errors import CheckpointError, RecipeError
from streammerge.recipe.types import ParameterSpec, Recipe

Methods = Mapping[str, tuple[ParameterSpec, ...]]

_POINTLESS = {
    "svd_full_matrices": (
        "in PEFT it chooses whether unused singular vectors are computed; here they never are, "
        "remove the key"
    ),
    "svd_driver": (
        "in PEFT it chooses a solver on CUDA; here the decomposition always runs on the CPU, with "
        "the same bits everywhere, remove the key"
    ),
}


def is_combination(recipe: Recipe) -> bool:
    """Return whether a parsed recipe makes an adapter of adapters."""
    return recipe.base is None and all(is_adapter(source.path) for source in recipe.sources)


def read_adapters(recipe: Recipe) -> list[Adapter]:
    """Return the adapters that a parsed recipe combines, in its order.

    Raises:
        RecipeError: An adapter has not the part that the recipe asks for.
        CheckpointError: One is not what an adapter should be.
    """
    return [read_named(source, f"sources[{index}]") for index, source in enumerate(recipe.sources)]


def every_method(models: Methods) -> Methods:
    """Return the methods of models, and the combination types with names of their own.

    Types that share a method's name take no parameter that the method does not.
    """
    return {name: each.parameters for name, each in COMBINATIONS.items()} | dict(models)


def methods_for(document: object, *, origin: str, models: Methods) -> Methods:
    """Return the methods that a recipe may use: those of models, or those of adapters alone.

    Args:
        document: The recipe's plain values, as yet unchecked.
        origin: What to call the document in messages.
        models: The methods that merge models, with their parameters.

    Raises:
        RecipeError: The recipe combines adapters, and its sources are something else; or it gives
            an option of PEFT that means nothing here.
    """
    if not isinstance(document, dict):
        return models
    method = document.get("method")
    foreign = isinstance(method, str) and method in COMBINATIONS.keys() - models.keys()
    has_base = document.get("base") is not None
    if has_base and not foreign:
        return models
    paths = [path for _, path in sources_of(document)]
    adapters = [is_adapter(_located(path)) for path in paths]
    if paths and all(adapters) and not has_base:
        given = document.get("parameters")
        for key in given if isinstance(given, dict) else ():
            if key in _POINTLESS:
                raise RecipeError(f"{origin}: parameters.{key}: {_POINTLESS[key]}")
        return {name: each.parameters for name, each in COMBINATIONS.items()}
    if foreign:
        why = "the recipe has a base; leave it out to combine adapters alone"
        if not has_base and False in adapters:
            index = adapters.index(False)
            why = f"sources[{index}] ({paths[index]}) is none"
        raise RecipeError(f"{origin}: method: {method} makes an adapter of adapters, but {why}")
    return models


def sources_of(document: object) -> list[tuple[int, Path]]:
    """Return the index and the path of each source that an unchecked recipe names.

    Args:
        document: The recipe's plain values; whatever has no path is skipped.
    """
    sources = document.get("sources") if isinstance(document, Mapping) else None
    paths = []
    for index, source in enumerate(sources if isinstance(sources, list) else ()):
        path = source.get("path") if isinstance(source, dict) else None
        if isinstance(path, str) and "\0" not in path:
            paths.append((index, Path(path)))
    return paths


def _located(path: Path) -> Path:
    """Return where a source is, if that is known yet; whoever reads it says what is wrong."""
    try:
        return locate_model(path, download=False)
    except CheckpointError:
        return path
