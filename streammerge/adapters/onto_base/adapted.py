"""An adapter seen as a model: its base, with some tensors changed and some replaced."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace

from streammerge.adapters.files.components import read_named
from streammerge.adapters.files.types import Adapter
from streammerge.adapters.onto_base.changes import Change, list_changes
from streammerge.adapters.onto_base.finding import find_homes
from streammerge.adapters.onto_base.remarks import remark_on_origin
from streammerge.checkpoint.types import Checkpoint, ShardFile, TensorEntry
from streammerge.errors import RecipeError, naming_source
from streammerge.recipe.types import Source


@dataclass(frozen=True, slots=True)
class AdaptedModel:
    """What an adapter makes of a base, without its being made."""

    files: tuple[ShardFile, ...]
    """The adapter's one file."""
    tensors: Mapping[str, TensorEntry]
    """Tensors that the adapter brings along whole, by their name in the base or beside it."""
    changes: Mapping[str, tuple[Change, ...]]
    """Changes of the base's tensors, or of those that the adapter brings along, by name."""
    untied: Mapping[str, str]
    """Tensors that the base's files lack, because they are tied, by the one that each equals."""
    notes: tuple[str, ...] = ()
    """What its configuration says that does not fit, or that PEFT would do otherwise."""


@dataclass(frozen=True, slots=True)
class TunedModel(Checkpoint):
    """A model together with an adapter of its own, which is merged into it while it is read."""

    changes: Mapping[str, tuple[Change, ...]] = field(default_factory=dict)
    """Changes of its tensors, by name."""
    adapter_files: tuple[ShardFile, ...] = ()
    """The adapter's one file, whose index comes after those of :attr:`files`."""
    replaced: Mapping[str, TensorEntry | None] = field(default_factory=dict)
    """What the model had in the place of tensors that the adapter brings along; None for nothing."""


def read_tuned(source: Source, label: str, model: Checkpoint) -> TunedModel:
    """Return a model with the adapter that a recipe names beside it.

    Args:
        source: The source, which has an adapter.
        label: Its place in the recipe, for messages.
        model: The model's headers.

    Raises:
        CheckpointError: The adapter is not what it should be, or belongs to another model.
    """
    assert source.adapter is not None  # noqa: S101 - the caller looked
    adapter = read_named(replace(source, path=source.adapter, component=None), f"{label}.adapter")
    with naming_source(f"{label}.adapter"):
        where = f"{label}.adapter ({source.adapter})"
        adapted = adapt(adapter, model, where=where, shares_ties=False)
    shift = len(model.files)
    brought = {name: _shifted(entry, shift) for name, entry in adapted.tensors.items()}
    changes = {
        name: tuple(
            replace(each, factors=tuple(_shifted(factor, shift) for factor in each.factors))
            for each in of_name
        )
        for name, of_name in adapted.changes.items()
    }
    whole = _with_untied(model, adapted.untied)
    notes = tuple(f"its adapter {note}" for note in adapted.notes)
    return TunedModel(
        **{each.name: getattr(whole, each.name) for each in fields(Checkpoint)}
        | {"tensors": {**whole.tensors, **brought}, "notes": (*whole.notes, *notes)},
        changes=changes,
        adapter_files=adapted.files,
        replaced={name: whole.tensors.get(name) for name in brought},
    )


def _shifted(entry: TensorEntry, shift: int) -> TensorEntry:
    """Return a tensor of a file that comes after as many others."""
    parts = tuple(replace(part, file=part.file + shift) for part in entry.parts)
    return replace(entry, file=entry.file + shift, parts=parts)


def stored_tensors(model: Checkpoint) -> Mapping[str, TensorEntry]:
    """Return the tensors of a model without what an adapter of its own brings along."""
    if not isinstance(model, TunedModel):
        return model.tensors
    others = {name: entry for name, entry in model.replaced.items() if entry is not None}
    own = {name: each for name, each in model.tensors.items() if name not in model.replaced}
    return own | others


def changes_of(model: Checkpoint | AdaptedModel) -> Mapping[str, tuple[Change, ...]]:
    """Return what adapters change in a model, by the tensors' names."""
    return model.changes if isinstance(model, AdaptedModel | TunedModel) else {}


def read_adapted(
    source: Source, label: str, base: Checkpoint | None, *, shares_ties: bool
) -> AdaptedModel:
    """Return what the adapter that a recipe names makes of the base.

    Args:
        source: The source.
        label: Its place in the recipe, for messages.
        base: The base's headers.
        shares_ties: As for :func:`adapt`.

    Raises:
        RecipeError: There is no base, or not the part of one that the adapter changes.
        CheckpointError: The adapter is not what it should be, or belongs to another base.
    """
    where = f"{label} ({source.path})"
    if base is None:
        raise RecipeError(
            f"{where} is an adapter and others are models; add `base: PATH`, the model that it was "
            "trained on"
        )
    if any(folder for folder, _ in base.parts) and base.config is None:
        raise RecipeError(
            f"{where} is an adapter and the base a pipeline; name the folder of the part that it "
            f"changes as the base: {base.path / base.parts[0][0]}"
        )
    adapter = read_named(source, label)
    with naming_source(label):
        return adapt(adapter, base, where=where, shares_ties=shares_ties)


def adapt(adapter: Adapter, base: Checkpoint, *, where: str, shares_ties: bool) -> AdaptedModel:
    """Return what an adapter does to a base.

    Args:
        adapter: The adapter.
        base: The base's headers.
        where: What to call the adapter in messages.
        shares_ties: Whether tied embeddings stay one tensor, as in PEFT's merge_and_unload.

    Raises:
        CheckpointError: The adapter does not belong to this base; see
            :func:`~streammerge.adapters.onto_base.finding.find_homes`.
    """
    homes = find_homes(adapter, base, where=where, shares_ties=shares_ties)
    tensors = {**homes.replaced, **homes.added}
    # What the adapter brings along takes the place of the base's, and is then changed.
    seen = {**_with_untied(base, homes.untied).tensors, **tensors}
    changes = list_changes(homes, seen)
    return AdaptedModel(
        files=(adapter.file,),
        tensors=tensors,
        changes={name: tuple(each) for name, each in changes.items()},
        untied=homes.untied,
        notes=tuple(remark_on_origin(adapter, base)),
    )


def _with_untied(model: Checkpoint, untied: Mapping[str, str]) -> Checkpoint:
    tensors = dict(model.tensors)
    for name, twin in untied.items():
        if name not in tensors and twin in tensors:
            tensors[name] = replace(tensors[twin], name=name)
    return replace(model, tensors=tensors)
