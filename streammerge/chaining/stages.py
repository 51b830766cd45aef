"""The recipes of a file, each with the names of the earlier results that it merges."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from streammerge.errors import RecipeError
from streammerge.recipe.dumping import dump_recipe
from streammerge.recipe.grid import expand_grid
from streammerge.recipe.refusing import shown
from streammerge.recipe.text import load_documents
from streammerge.recipe.types import Recipe
from streammerge.run import parse_document, read_recipe_text
from streammerge.storage.urls import spelled
from streammerge.together import Grid

_NAME = re.compile(r"[\w-]{1,100}")
"""What a stage may be called: it becomes a directory, and must not look like a file."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One recipe of several."""

    name: str
    """What later ones call its result; the last one may have none, and is called ``result``."""
    recipe: Recipe
    """The recipe, in which earlier results stand by their names."""
    uses: tuple[str, ...]
    """The earlier stages whose results it merges."""


@dataclass(frozen=True, slots=True)
class Chain:
    """The recipes of one file, in order; the last one's result is the output."""

    origin: Path
    """The file."""
    text: str
    """What it holds."""
    stages: tuple[Stage, ...]
    """At least two."""


def dump_chain(chain: Chain, dump: Callable[[Recipe], str] = dump_recipe) -> str:
    """Return all recipes as one text of YAML documents that makes the same result.

    Args:
        chain: The recipes.
        dump: Writes one of them.
    """
    return "---\n".join(f"name: {each.name}\n{dump(each.recipe)}" for each in chain.stages)


def read_recipes(path: Path, *, download: bool) -> Recipe | Chain | Grid:
    """Return the recipe of a file, or all of them if there are several, or it has a grid.

    The file is read once: it may be a pipe.

    Args:
        path: The file.
        download: As for :func:`streammerge.run.plan`.

    Raises:
        RecipeError: The file cannot be read, or its recipes are not what they should be.
    """
    text = read_recipe_text(path)
    documents = load_documents(text, origin=str(path))
    if len(documents) < 2:
        document = documents[0] if documents else None
        expanded = expand_grid(document, origin=str(path))
        if expanded is not None:
            return Grid(
                tuple(
                    (name, parse_document(each, f"{path}: {name}", download=download))
                    for name, each in expanded
                )
            )
        recipe = parse_document(document, str(path), download=download)
        if recipe.base_adapter is None:
            return recipe
        return Chain(path, text, tuple(_with_base(Stage("result", recipe, ()))))
    return Chain(path, text, tuple(_stages(path, documents, download=download)))


def _with_base(stage: Stage) -> Iterator[Stage]:
    """Yield a recipe, and before it the one that merges an adapter into its base, if it has one."""
    recipe = stage.recipe
    if recipe.base is None or recipe.base_adapter is None:
        yield stage
        return
    name = f"base-of-{stage.name}"
    document = {
        "method": "task_arithmetic",
        "base": spelled(recipe.base),
        "sources": [{"path": spelled(recipe.base_adapter)}],
    }
    where = recipe.in_its_words("base")
    made = parse_document(document, where, download=False)
    named = {str(each) for each in models_of(made)}
    yield Stage(name, made, tuple(each for each in stage.uses if each in named))
    # Where a source is the same, it has the same values: as stored, and not as computed.
    sources = (
        replace(source, path=Path(name), adapter=None)
        if (source.path, source.adapter) == (recipe.base, recipe.base_adapter)
        else source
        for source in recipe.sources
    )
    merged = replace(recipe, base=Path(name), base_adapter=None, sources=tuple(sources))
    yield Stage(stage.name, merged, (*stage.uses, name))


def _stages(path: Path, documents: Sequence[object], *, download: bool) -> list[Stage]:
    stages: list[Stage] = []
    for index, document in enumerate(documents):
        where = f"{path}: document {index + 1} of {len(documents)}"
        if not isinstance(document, dict):
            raise RecipeError(
                f"{where}: expected a mapping of keys to values, got {shown(document)}"
            )
        is_last = index + 1 == len(documents)
        name = _name_of(document.get("name", "result" if is_last else None), where)
        known = [stage.name for stage in stages]
        if name in known:
            raise RecipeError(f"{where}: name: {shown(name)} is the name of an earlier recipe")
        text = {key: value for key, value in document.items() if key != "name"}
        recipe = parse_document(text, where, download=download, results=known)
        named = {str(each) for each in models_of(recipe)}
        stage = Stage(name, recipe, tuple(each for each in known if each in named))
        stages.extend(_with_base(stage))
    used = {each for stage in stages for each in stage.uses}
    unused = [stage.name for stage in stages[:-1] if stage.name not in used]
    if unused:
        raise RecipeError(
            f"{path}: no later recipe merges {', '.join(map(shown, unused))}{_perhaps_meant(stages)}; the results "
            "in between are removed in the end, so give a recipe of its own to what is to be kept"
        )
    return stages


def _perhaps_meant(stages: Sequence[Stage]) -> str:
    """Return which names in recipes are those of nothing, one of which may be a slip."""
    names = {stage.name for stage in stages}
    named = {str(path) for stage in stages for path in models_of(stage.recipe)} - names
    nothing = sorted(each for each in named if _NAME.fullmatch(each) and not os.path.lexists(each))
    return f", and {', '.join(map(shown, nothing))} is neither a name nor here" if nothing else ""


def _name_of(name: object, where: str) -> str:
    """Return the name of a stage, which becomes that of a directory."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise RecipeError(
            f"{where}: name: expected a name by which a later recipe calls the result, of at most 100 "
            f"letters, digits and -_, got {shown(name)}"
        )
    if os.path.lexists(name):
        raise RecipeError(
            f"{where}: name: there is something here called {shown(name)}, which a recipe might mean as "
            "well; choose another name"
        )
    return name


def models_of(recipe: Recipe) -> Iterator[Path]:
    """Yield what a recipe reads: the base, sources, their adapters, and whose companions it takes."""
    if recipe.base is not None:
        yield recipe.base
    for source in recipe.sources:
        yield source.path
        if source.adapter is not None:
            yield source.adapter
    yield from (each for each in recipe.output.companions.values() if isinstance(each, Path))
