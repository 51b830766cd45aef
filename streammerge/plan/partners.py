"""Parts of a pipeline that not every input has: merged with those that have them, else copied.

What is decided becomes rules of the recipe, behind those of the user: the plan, the manifest and the
output's recipe say it in words that everybody can change.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Sequence
from dataclasses import replace

from streammerge.checkpoint.types import Checkpoint
from streammerge.errors import RecipeError
from streammerge.recipe.resolving import Resolved
from streammerge.recipe.types import BASE, Recipe, Rule


def settle_parts(
    recipe: Recipe,
    first: Checkpoint,
    sources: Sequence[Checkpoint],
    resolve: Callable[[str], Resolved],
) -> Recipe:
    """Return the recipe with a rule for each part that some input lacks.

    Args:
        recipe: What is asked for.
        first: The base, or the first source.
        sources: The sources that are full models.
        resolve: What the recipe says about a tensor name.

    Returns:
        Parts that no source has are copied from the base, those that only sources have are dropped; a
        source that lacks a part leaves it as it is in the base. Without a base, parts that some source
        lacks are copied from the first one. Parts that the recipe copies or drops are left to it.

    Raises:
        RecipeError: A source has no part that every input has.
    """
    rules: list[Rule] = []
    decided: set[str] = set()
    own = {folder for folder, _ in first.parts if folder}
    held = [{folder for folder, _ in source.parts if folder} for source in sources]
    for folder in sorted(own.union(*held)):
        enough = any if recipe.base is not None else all
        merges = folder in own and enough(folder in each for each in held)
        if merges or _is_settled(folder, (first, *sources), resolve):
            decided.add(folder)
            continue
        pattern = f"{glob.escape(folder)}/*"
        if folder in own:
            origin = BASE if recipe.base is not None else 0
            rules.append(Rule(pattern, parameters={}, copy=origin))
        else:
            rules.append(Rule(pattern, parameters={}, drop=True))
    for source, folders in zip(sources, held, strict=True):
        if folders and not folders & decided:
            raise RecipeError(
                f"{source.path}: nothing of it would be in the result, since another input lacks "
                f"{', '.join(sorted(folders))}; merge part by part, with the folder of the part as the "
                "base, or say what is copied in `rules`"
            )
    return replace(recipe, rules=(*recipe.rules, *rules)) if rules else recipe


def _is_settled(
    folder: str, models: Sequence[Checkpoint], resolve: Callable[[str], Resolved]
) -> bool:
    """Return whether the recipe itself copies or drops every tensor of a part."""
    names = {name for each in models for name in each.tensors if name.startswith(f"{folder}/")}
    settled = map(resolve, names)
    return all(each.copy is not None or each.drop for each in settled)
