"""Tensors of the same place under other names: sources get the names of the first model.

First what the recipe says (``rename``); then what is known: spellings that changed between versions of
transformers, wrappers of compilers and trainers, the tower of a larger model, whole beginnings. A name
is only changed to one that the source lacks, and never two to the same one.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial

from streammerge.adapters.onto_base.adapted import TunedModel, changes_of
from streammerge.adapters.onto_base.locating import WRAPPERS, BaseNames, Shape, Wanted, locate
from streammerge.adapters.onto_base.renames import renamings
from streammerge.assignment.experts import match_experts
from streammerge.assignment.types import Model
from streammerge.checkpoint.types import Checkpoint, Note, TensorEntry
from streammerge.errors import CheckpointError, RecipeError, printable
from streammerge.recipe.types import Recipe, Rename

_NORMS = {"gamma": "weight", "beta": "bias", "weight": "gamma", "bias": "beta"}
"""What TensorFlow calls the parameters of a norm, as do files that were made from its; and back."""
_SHOWN = 4
"""Kinds of renaming that the plan spells out for a model."""


def match_names(
    models: Sequence[Model], labels: Sequence[str], recipe: Recipe
) -> tuple[list[Model], list[Note], dict[str, str]]:
    """Return the models with the names that the first one has, and what was renamed.

    Args:
        models: The base, if any, and the sources.
        labels: How messages name each of them.
        recipe: Says which names to change.

    Returns:
        The models, what the plan has to state, and the new name of each renamed tensor by its old one.

    Raises:
        RecipeError: A ``rename`` fits no name, or gives two tensors the same one.
    """
    matched: list[Model] = []
    notes: list[Note] = []
    renamed: dict[str, str] = {}
    for index, (label, model) in enumerate(zip(labels, models, strict=True)):
        source = index - (recipe.base is not None)
        renames = recipe.sources[source].rename if source >= 0 else ()
        if not isinstance(model, Checkpoint):
            if renames:
                raise RecipeError(
                    f"sources[{source}].rename: {recipe.sources[source].path} is an adapter, whose names "
                    "are found in the base by what is known of adapters; remove the key"
                )
            matched.append(model)
            continue
        asked = _asked(model, renames, where=f"sources[{source}].rename")
        renamed |= asked
        named = _renamed(model, asked)
        first = matched[0] if matched else named
        if isinstance(first, Checkpoint) and first is not named:
            named, made = match_experts(named, first, label)
            _check_changes(named, label)
            notes += made
            known = _known(named, first)
            renamed |= known
            named = _renamed(named, known)
            notes += _describe(known, label)
        matched.append(named)
    return matched, notes, renamed


def _check_changes(model: Checkpoint, label: str) -> None:
    """Raise if an adapter changes tensors that are seen as others now."""
    gone = [name for name in changes_of(model) if name not in model.tensors]
    if gone:
        raise CheckpointError(
            f"{label}.adapter: changes {printable(gone[0])}, and the experts of this model are stored "
            "otherwise than those of the first one; merge the adapter into the model first"
        )


def _renamed(model: Checkpoint, names: Mapping[str, str]) -> Checkpoint:
    if not names:
        return model
    tensors: dict[str, TensorEntry] = {}
    for name, entry in model.tensors.items():
        new = names.get(name)
        tensors[new or name] = entry if new is None else replace(entry, name=new)
    if isinstance(model, TunedModel):
        changes = {names.get(name, name): each for name, each in model.changes.items()}
        return replace(model, tensors=tensors, changes=changes)
    return replace(model, tensors=tensors)


def _asked(model: Checkpoint, renames: Sequence[Rename], *, where: str) -> dict[str, str]:
    """Return the new names that a recipe gives to tensors."""
    if not renames:
        return {}
    patterns = [_pattern(rename, where=f"{where}[{index}]") for index, rename in enumerate(renames)]
    used: set[int] = set()
    names: dict[str, str] = {}
    for name in model.tensors:
        for index, pattern in enumerate(patterns):
            found = pattern.match(name)
            if found is None:
                continue
            used.add(index)
            names[name] = _filled(renames[index].new, found) + name[found.end() :]
            break
    for index, rename in enumerate(renames):
        if index not in used:
            example = printable(next(iter(model.tensors), "none"))
            raise RecipeError(
                f'{where}[{index}].from: no tensor of {model.path} fits "{printable(rename.old)}" (or '
                f'those that do fit an earlier one); the names look like "{example}"'
            )
    counts = Counter(names.get(name, name) for name in model.tensors)
    twice = next((name for name, count in counts.items() if count > 1), None)
    if twice is not None:
        raise RecipeError(f"{where}: two tensors would be called {printable(twice)}")
    return names


def _pattern(rename: Rename, *, where: str) -> re.Pattern[str]:
    """Return what matches names: a beginning, or all of a glob."""
    stars = rename.old.count("*")
    if stars != rename.new.count("*"):
        raise RecipeError(
            f"{where}: `from` has {stars} stars and `to` has {rename.new.count('*')}; each star "
            "stands for what stays, so there must be as many"
        )
    pattern = "(.*)".join(re.escape(part) for part in rename.old.split("*"))
    return re.compile(pattern + (r"\Z" if stars else ""))


def _filled(new: str, found: re.Match[str]) -> str:
    first, *rest = new.split("*")
    return first + "".join(kept + part for kept, part in zip(found.groups(), rest, strict=True))


def _known(model: Checkpoint, first: Checkpoint) -> dict[str, str]:
    """Return the names that are known to be other spellings of names of the first model."""
    strange = [name for name in model.tensors if name not in first.tensors]
    free = {name: entry for name, entry in first.tensors.items() if name not in model.tensors}
    if not strange or not free:
        return {}
    endings = {".".join(name.split(".")[-2:]) for name in free}
    wanted = {_respelled(name, endings): name for name in strange}
    located = locate(
        [Wanted(path, partial(_fits, model.tensors[name].shape)) for path, name in wanted.items()],
        BaseNames(free),
    )
    counts = Counter(located.names.values())
    return {
        wanted[path]: found
        for path, found in located.names.items()
        if counts[found] == 1
        and _is_plausible(path, found)
        and len(first.tensors[found].shape) == len(model.tensors[wanted[path]].shape)
    }


def _respelled(name: str, endings: Collection[str]) -> str:
    """Return a name without wrappers, and with the first model's spelling of parameters of norms.

    Args:
        name: A name that the first model does not have.
        endings: The last two parts of those names of the first model that are not taken.
    """
    name = ".".join(part for part in name.split(".") if part not in WRAPPERS)
    outer, _, last = name.rpartition(".")
    other = _NORMS.get(last)
    ending = f"{outer.rpartition('.')[2]}.{other}"
    return f"{outer}.{other}" if other is not None and ending in endings else name


def _is_plausible(path: str, found: str) -> bool:
    """Return whether names can be those of one module: not two that merely have equal shapes inside.

    One beginning is a part of the other, as with wrappers and towers, or it is a known other spelling.
    """
    old, new = path.split("."), found.split(".")
    while old and new and old[-1] == new[-1]:
        old.pop()
        new.pop()
    short, long = sorted((old, new), key=len)
    if not short or long[: len(short)] == short or long[-len(short) :] == short:
        return True
    return any(found == each or found.endswith(f".{each}") for each in renamings(path))


def _fits(shape: Shape, other: Shape) -> bool:
    return shape == other


def _describe(names: Mapping[str, str], label: str) -> list[Note]:
    """Return what was renamed, by what changed in the names."""
    kinds = Counter(_difference(old, new) for old, new in names.items())
    notes = [
        Note("renamed", f'{label}: "{old}" is "{new}" in {count} name(s)')
        for (old, new), count in kinds.most_common(_SHOWN)
    ]
    if len(kinds) > _SHOWN:
        rest = sum(count for _, count in kinds.most_common()[_SHOWN:])
        notes.append(
            Note("renamed", f"{label}: {rest} more name(s), by {len(kinds) - _SHOWN} rules")
        )
    return notes


def _difference(old: str, new: str) -> tuple[str, str]:
    """Return two names without what they end with alike, and without their numbers."""
    one, other = old.split("."), new.split(".")
    while one and other and one[-1] == other[-1]:
        one.pop()
        other.pop()
    return _without_numbers(one), _without_numbers(other)


def _without_numbers(parts: Sequence[str]) -> str:
    return ".".join("*" if part.isdecimal() else part for part in parts)
