"""The models and adapters that a recipe names: located, and read by their headers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from streammerge.adapters.combining.recipes import sources_of
from streammerge.adapters.files.reading import is_adapter
from streammerge.adapters.onto_base.adapted import AdaptedModel, read_adapted, read_tuned
from streammerge.checkpoint.coded import read_codes
from streammerge.checkpoint.composite import fit_parts, read_model
from streammerge.checkpoint.header import ParsedHeaders
from streammerge.checkpoint.hub import locate_model
from streammerge.checkpoint.metadata import read_metadata
from streammerge.checkpoint.quantised import check_not_quantized
from streammerge.checkpoint.reading import check_gathered, check_whole
from streammerge.checkpoint.types import Checkpoint
from streammerge.errors import RecipeError, naming_source
from streammerge.recipe.types import Recipe, Source


def download_sources(document: object, *, made_here: Sequence[str] = ()) -> None:
    """Fetch the sources that an unchecked recipe names, where they are not on this machine.

    Args:
        document: The recipe's plain values.
        made_here: Names of models that are still to be made.

    Raises:
        CheckpointError: One of them cannot be had.
    """
    for index, path in sources_of(document):
        if str(path) in made_here:
            continue
        with naming_source(f"sources[{index}]"):
            locate_model(path, download=True)


def locate_models(recipe: Recipe, *, download: bool) -> Recipe:
    """Return the recipe with the paths of all models in the place of their names.

    Args:
        recipe: The parsed recipe.
        download: Whether what the hub's cache on this machine has not is fetched.

    Raises:
        CheckpointError: A model is not there.
    """
    base = recipe.base
    if base is not None:
        with naming_source("base"):
            base = locate_model(base, download=download)
    sources = []
    for index, source in enumerate(recipe.sources):
        with naming_source(f"sources[{index}]"):
            located = replace(source, path=locate_model(source.path, download=download))
        if source.adapter is not None:
            with naming_source(f"sources[{index}].adapter"):
                adapter = locate_model(source.adapter, download=download)
            located = replace(located, adapter=adapter)
        sources.append(located)
    return replace(recipe, base=base, sources=tuple(sources))


@dataclass(frozen=True, slots=True)
class ReadModels:
    """What the headers of a recipe's models say."""

    base: Checkpoint | None
    """The base, if the recipe has one."""
    sources: tuple[Checkpoint | AdaptedModel, ...]
    """The sources, in the recipe's order."""
    metadata_left_out: tuple[str, ...]
    """What the headers of the first model say that does not hold for the result."""

    @property
    def models(self) -> tuple[Checkpoint | AdaptedModel, ...]:
        """The base, if any, then the sources."""
        return self.sources if self.base is None else (self.base, *self.sources)

    @property
    def first(self) -> Checkpoint:
        """The base, or the first source: the one whose names and files the result has."""
        return _first(self.models)


def read_models(recipe: Recipe, *, shares_ties: bool) -> ReadModels:
    """Return the models of a recipe, with their parts called as those of the first one.

    Args:
        recipe: The parsed recipe, with the paths of its models.
        shares_ties: Whether tied embeddings stay one tensor when an adapter changes them.

    Raises:
        RecipeError: A source is an adapter, and there is no base for it, or the wrong one.
        CheckpointError: A model is not what it should be.
    """
    parsed: ParsedHeaders = {}
    base = None if recipe.base is None else _read_model(recipe.base, "base", parsed)
    sources = [
        _read_source(source, f"sources[{index}]", base, parsed, shares_ties=shares_ties)
        for index, source in enumerate(recipe.sources)
    ]
    first, left_out = _with_metadata(_first(sources) if base is None else base)
    base, sources = (None, [first, *sources[1:]]) if base is None else (first, sources)
    fitted = (
        _fitted(source, first, recipe.sources[index], f"sources[{index}]")
        for index, source in enumerate(sources)
    )
    return ReadModels(base, tuple(fitted), left_out)


def _read_source(
    source: Source,
    label: str,
    base: Checkpoint | None,
    parsed: ParsedHeaders,
    *,
    shares_ties: bool,
) -> Checkpoint | AdaptedModel:
    with naming_source(label):
        adapted = is_adapter(source.path)
    if adapted and source.adapter is not None:
        raise RecipeError(
            f"{label}.adapter: {source.path} is an adapter itself; name the model that both belong to as "
            "the path, or give each adapter a source of its own"
        )
    if adapted:
        return read_adapted(source, label, base, shares_ties=shares_ties)
    model = _read_model(source.path, label, parsed)
    return model if source.adapter is None else read_tuned(source, label, model)


def _read_model(path: Path, label: str, parsed: ParsedHeaders) -> Checkpoint:
    with naming_source(label):
        checkpoint = read_codes(read_model(path, parsed))
        check_whole(checkpoint)
        check_gathered(checkpoint)
        for part in (checkpoint, *(part for _, part in checkpoint.parts)):
            check_not_quantized(part)
    return checkpoint


def _first(models: Sequence[Checkpoint | AdaptedModel]) -> Checkpoint:
    first = models[0]
    assert isinstance(first, Checkpoint)  # noqa: S101 - adapters without a base are refused
    return first


def _with_metadata(first: Checkpoint) -> tuple[Checkpoint, tuple[str, ...]]:
    """Return the first model with what its headers say, and which of their keys hold no more."""
    parts = []
    left_out: set[str] = set()
    for folder, part in first.parts or (("", first),):
        metadata, stale = read_metadata(
            [file.path for file in part.files], dequantised=first.dequantised
        )
        parts.append((folder, replace(part, metadata=metadata)))
        left_out |= {*stale}
    if first.parts:
        return replace(first, parts=tuple(parts)), tuple(sorted(left_out))
    return parts[0][1], tuple(sorted(left_out))


def _fitted(
    source: Checkpoint | AdaptedModel, first: Checkpoint, named: Source, label: str
) -> Checkpoint | AdaptedModel:
    """Return a source whose parts are called as those of the first model."""
    if isinstance(source, AdaptedModel) or (source is first and named.component is None):
        return source
    with naming_source(label):
        fitted = fit_parts(source, first, named.component, where=f"{label} ({named.path})")
    if named.adapter is not None and fitted is not source:
        raise RecipeError(
            f"{label}.adapter: {named.path} is a part of a pipeline, or has parts, and its adapter would "
            "change tensors that are called otherwise in the first model; merge the adapter into it first, "
            "and name what comes of it"
        )
    return fitted
