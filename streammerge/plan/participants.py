"""The models that take part in a merge, and how messages name them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from streammerge.adapters.onto_base.adapted import AdaptedModel
from streammerge.assignment.types import Model
from streammerge.checkpoint.hub import hub_revision
from streammerge.checkpoint.types import Note
from streammerge.methods.base import MergeMethod, Operand
from streammerge.plan.types import InputModel
from streammerge.recipe.types import Recipe, Source
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


def remark_on_participants(
    recipe: Recipe, method: MergeMethod, sources: Sequence[Model]
) -> Iterator[Note]:
    """Yield what may be meant, and mostly is a slip: a model that is named twice, a base that nothing asks for.

    Args:
        recipe: The parsed recipe.
        method: What is done with its models.
        sources: The sources' headers.
    """
    if recipe.mixture is not None:
        return
    first: dict[tuple[str, str, str | None], int] = {}
    for index, source in enumerate(recipe.sources):
        same = first.setdefault(_what(source), index)
        if same != index:
            yield Note(
                "sources",
                f"sources[{index}] is sources[{same}] once more: {origin_of(source.path)}",
            )
    if recipe.base is None:
        return
    if method.operand is Operand.WEIGHTS:
        if not any(isinstance(each, AdaptedModel) for each in sources):
            yield Note(
                "base",
                f"{method.name} merges the values of the sources; of the base the output has names and the files "
                "beside the tensors, and values where a rule copies them",
            )
        return
    base = _real(recipe.base)
    for index, source in enumerate(recipe.sources):
        if source.adapter is None and _real(source.path) == base:
            yield Note("sources", f"sources[{index}] is the base: its task vector is 0 everywhere")


def _what(source: Source) -> tuple[str, str, str | None]:
    adapter = "" if source.adapter is None else _real(source.adapter)
    return _real(source.path), adapter, source.component


def _real(path: Path) -> str:
    """Return where a path leads; the address of what it is a copy of."""
    return address_of(path) or os.path.realpath(path)
