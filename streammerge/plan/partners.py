"""Parts of a pipeline that not every input has: merged where all have them, else copied as they are.

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
        Parts that some source lacks are copied from the first model, those that only sources have are
        dropped. Parts whose tensors the recipe copies or drops already are left to it.

    Raises:
        RecipeError: A source has no part that every input has.
    """
    rules: list[Rule] = []
    decided: set[str] = set()
    own = {folder for folder, _ in first.parts if folder}
    held = [{folder for folder, _ in source.parts if folder} for source in sources]
    for folder in sorted(own.union(*held)):
        everywhere = folder in own and all(folder in each for each in held)
        if everywhere or _is_settled(folder, (first, *sources), resolve):
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
                f"{source.path}: nothing of it would be in the result, since some other input lacks "
                f"{', '.join(sorted(folders))}, and only parts that all have are merged; merge part by "
                "part, with the folder of the part as the base, or say what is copied in `rules`"
            )
    return replace(recipe, rules=(*recipe.rules, *rules)) if rules else recipe


def _is_settled(
    folder: str, models: Sequence[Checkpoint], resolve: Callable[[str], Resolved]
) -> bool:
    """Return whether the recipe itself copies or drops every tensor of a part."""
    names = {name for each in models for name in each.tensors if name.startswith(f"{folder}/")}
    settled = map(resolve, names)
    return all(each.copy is not None or each.drop for each in settled)
