"""The models that take part in a merge, and how messages name them."""

from __future__ import annotations

from streammerge.checkpoint.hub import hub_revision
from streammerge.plan.types import InputModel
from streammerge.recipe.types import Recipe
from streammerge.storage.copies import address_of, origin_of


def labels_of(recipe: Recipe) -> list[str]:
    """Return how messages name the base, if any, and the sources."""
    return [f"{model.label} ({model.origin})" for model in models_of(recipe)]


def models_of(recipe: Recipe) -> tuple[InputModel, ...]:
    """Return the base, if any, and the sources, as a plan names them."""
    models = [
        InputModel(
            f"sources[{index}]",
            str(source.path),
            hub_revision(source.path),
            adapter=None if source.adapter is None else origin_of(source.adapter),
            address=address_of(source.path),
        )
        for index, source in enumerate(recipe.sources)
    ]
    if recipe.base is not None:
        base = InputModel(
            "base",
            str(recipe.base),
            hub_revision(recipe.base),
            address=address_of(recipe.base),
        )
        models.insert(0, base)
    return tuple(models)
