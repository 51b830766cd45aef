"""Where a parameter may stand in a recipe, and which of its values a tensor gets.

The most specific value wins: a matching rule's, then the source's own, then the recipe's, then the
default that the method declares.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from streammerge.errors import RecipeError
from streammerge.recipe.schema import (
    RuleDocument,
    SourceDocument,
    key_path,
    keys_of,
    refuse_choice,
    refuse_integer,
    refuse_number,
    shown,
    unknown_key,
)
from streammerge.recipe.types import (
    MismatchPolicy,
    ParameterKind,
    ParameterSpec,
    ParameterValue,
    Recipe,
    Rule,
    RuleDType,
    Scalar,
)


@dataclass(frozen=True, slots=True)
class Resolved:
    """What happens to a tensor; equal settings of one resolver are one object."""

    copy: int | None
    """Copy the tensor from this source index, or from BASE; None merges it."""
    drop: bool
    """Leave the tensor out of the output."""
    values: tuple[tuple[str, ParameterValue], ...]
    """Name and value of every parameter, in the method's order; a tuple has one value per source."""
    keeps_dtype: bool = False
    """Store it in the type that it has."""
    common: bool = False
    """Merge what all have, where shapes differ along one dimension."""


def resolve(recipe: Recipe, tensor_name: str, specs: tuple[ParameterSpec, ...]) -> Resolved:
    """Return the settings of one tensor; :func:`build_resolver` is the way to ask for many.

    Args:
        recipe: The parsed recipe.
        tensor_name: The tensor's name in the output.
        specs: The parameters of the recipe's method.

    Raises:
        RecipeError: A parameter has neither a value nor a default.
    """
    return build_resolver(recipe, specs)(tensor_name)


def build_resolver(recipe: Recipe, specs: tuple[ParameterSpec, ...]) -> Callable[[str], Resolved]:
    """Return a function from a tensor name to its settings, which compiles each glob once.

    There are only as many different settings as rules, and one more, so they are made here too
    and a call does nothing but match.

    Args:
        recipe: The parsed recipe.
        specs: The parameters of the recipe's method.

    Raises:
        RecipeError: A parameter has neither a value nor a default.
    """
    # The text of a value tells 0.0 from -0.0 and 1 from True, which compare equal.
    shared: dict[str, Resolved] = {}

    def settle(rule: Rule | None) -> Resolved:
        settled = _settle(recipe, rule, specs)
        return shared.setdefault(repr(settled), settled)

    # fnmatchcase, without its cache of 256 patterns.
    by_glob = [
        (re.compile(fnmatch.translate(rule.tensors)).match, settle(rule)) for rule in recipe.rules
    ]
    otherwise = settle(None)

    def resolve_tensor(tensor_name: str) -> Resolved:
        for matches, settled in by_glob:
            if matches(tensor_name):
                return settled
        return otherwise

    return resolve_tensor


def _settle(recipe: Recipe, rule: Rule | None, specs: tuple[ParameterSpec, ...]) -> Resolved:
    """Return the settings of the tensors that fall under ``rule``, or under none."""
    n_sources = len(recipe.sources)
    values: list[tuple[str, ParameterValue]] = []
    for spec in specs:
        ruled = None if rule is None else rule.parameters.get(spec.name)
        common = (
            ruled
            if ruled is not None
            else recipe.parameters.get(spec.name, spec.default_of(recipe.semantics))
        )
        if not spec.per_source:
            if common is None:
                raise RecipeError(f"parameters.{spec.name}: this key is required")
            values.append((spec.name, common))
            continue
        each: list[Scalar] = []
        for index, shared in enumerate(_one_each(common, n_sources)):
            own = recipe.sources[index].parameters.get(spec.name) if ruled is None else None
            value = shared if own is None else own
            if value is None:
                raise RecipeError(f"sources[{index}].{spec.name}: this key is required")
            each.append(value)
        values.append((spec.name, tuple(each)))
    return Resolved(
        copy=None if rule is None else rule.copy,
        drop=rule is not None and rule.drop,
        keeps_dtype=rule is not None and rule.dtype is RuleDType.KEEP,
        common=((rule and rule.mismatch) or recipe.mismatch) is MismatchPolicy.COMMON,
        values=tuple(values),
    )


def _one_each(value: ParameterValue | None, n_sources: int) -> tuple[Scalar | None, ...]:
    return value if isinstance(value, tuple) else (value,) * n_sources


class Place(Enum):
    """Where a parameter may stand."""

    RECIPE = "recipe"
    SOURCE = "source"
    RULE = "rule"

    @property
    def other_keys(self) -> tuple[str, ...]:
        """The keys there that are no parameters."""
        return _OTHER_KEYS[self]


# Beside the enumeration: Python before 3.11.4 turns a member whose value is an empty tuple into a
# plain object.
_OTHER_KEYS: dict[Place, tuple[str, ...]] = {
    Place.RECIPE: (),
    Place.SOURCE: keys_of(SourceDocument),
    Place.RULE: keys_of(RuleDocument),
}


def may_stand(spec: ParameterSpec, place: Place) -> bool:
    """Return whether the parameter may be given in ``place``."""
    match place:
        case Place.SOURCE:
            return spec.per_source
        case Place.RULE:
            return spec.per_tensor
        case Place.RECIPE:
            return True


def tables_of(document: Mapping[Any, Any], key: str) -> list[tuple[int, dict[Any, Any]]]:
    """Return the mappings in the list at ``key`` with their indices; whatever else is skipped."""
    entries = document.get(key)
    entries = entries if isinstance(entries, list) else []
    return [(index, entry) for index, entry in enumerate(entries) if isinstance(entry, dict)]


def iter_parameter_problems(
    document: Mapping[Any, Any], specs: tuple[ParameterSpec, ...]
) -> Iterator[str]:
    """Yield what is wrong with the parameters in an unchecked ``document``, a line for each.

    Args:
        document: The recipe document; the shape of what is no parameter is not judged.
        specs: The parameters of its method.
    """
    sources = document.get("sources")
    n_sources = len(sources) if isinstance(sources, list) else 0
    common = document.get("parameters", {})
    by_name = {spec.name: spec for spec in specs}
    places: list[tuple[Place, tuple[object, ...], dict[Any, Any]]] = []
    if isinstance(common, dict):
        places.append((Place.RECIPE, ("parameters",), common))
    for index, table in tables_of(document, "sources"):
        places.append((Place.SOURCE, ("sources", index), table))
    for index, table in tables_of(document, "rules"):
        places.append((Place.RULE, ("rules", index), table))
    for place, steps, table in places:
        for name, value in table.items():
            if name in place.other_keys:
                continue
            path = key_path(*steps, name)
            said = _refuse_place(name, place, by_name)
            if said is not None:
                yield f"{path}: {said}"
            else:
                yield from _value_problems(path, by_name[name], value, place, n_sources)
    if isinstance(common, dict):
        yield from _missing_problems(document, common, specs)


def _refuse_place(name: object, place: Place, specs: Mapping[str, ParameterSpec]) -> str | None:
    """Return why the key ``name`` may not stand in ``place``, or None if it may."""
    spec = specs.get(name) if isinstance(name, str) else None
    if spec is None:
        allowed = [name for name, spec in specs.items() if may_stand(spec, place)]
        return unknown_key(name, [*place.other_keys, *allowed])
    if may_stand(spec, place):
        return None
    served = "all sources" if place is Place.SOURCE else "the whole model"
    return f'one value serves {served}; move it to "parameters"'


def _value_problems(
    path: str, spec: ParameterSpec, value: object, place: Place, n_sources: int
) -> Iterator[str]:
    """Yield what is wrong with one parameter's value, which may be a list with one per source."""
    if not (isinstance(value, list) and spec.per_source and place is not Place.SOURCE):
        if (said := _refuse_scalar(spec, value)) is not None:
            yield f"{path}: {said}"
        return
    # Without sources there is nothing to count, and the document is refused for that.
    if n_sources and len(value) != n_sources:
        yield f"{path}: expected {n_sources} values, one for each source, got {len(value)}"
    for index, item in enumerate(value):
        if (said := _refuse_scalar(spec, item)) is not None:
            yield f"{path}[{index}]: {said}"


def _refuse_scalar(spec: ParameterSpec, value: object) -> str | None:
    """Return what is wrong with ``value`` for ``spec``, or None if nothing is."""
    match spec.kind:
        case ParameterKind.FLOAT:
            return refuse_number(value, spec.minimum, spec.maximum)
        case ParameterKind.INT:
            return refuse_integer(value, spec.minimum, spec.maximum)
        case ParameterKind.BOOL:
            return (
                None if isinstance(value, bool) else f"expected true or false, got {shown(value)}"
            )
        case ParameterKind.CHOICE:
            known = isinstance(value, str) and value in spec.choices
            return None if known else refuse_choice(value, spec.choices)


def _missing_problems(
    document: Mapping[Any, Any], common: Mapping[Any, Any], specs: tuple[ParameterSpec, ...]
) -> Iterator[str]:
    """Yield the parameters that have no default and are not given for some source."""
    for spec in specs:
        if spec.default is not None or spec.name in common:
            continue
        why = f"this key is required, as {document.get('method')} has no default for it"
        if not spec.per_source:
            yield f"parameters.{spec.name}: {why}"
            continue
        for index, source in tables_of(document, "sources"):
            if spec.name not in source:
                path = f"sources[{index}].{spec.name}"
                where = f'here, for {shown(source.get("path"))}, or under "parameters" for all'
                yield f"{path}: {why}; give it {where}"
