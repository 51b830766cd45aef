"""Where a parameter may stand in a recipe, and which of its values a tensor gets.

The most specific value wins: a matching rule's, then that of the source in a slice of layers, then
the slice's, then the source's own, then the recipe's, then the default that the method declares. Of
one that differs between tensors, what it is for the tensor counts; where it says nothing, the next.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any

from streammerge.errors import RecipeError, printable
from streammerge.recipe.refusing import (
    key_path,
    refuse_choice,
    refuse_integer,
    refuse_number,
    shown,
    unknown_key,
)
from streammerge.recipe.schema import (
    LayerRangeDocument,
    LayerSliceDocument,
    RuleDocument,
    SourceDocument,
    keys_of,
)
from streammerge.recipe.types import (
    Cases,
    Given,
    Gradient,
    LayerSlice,
    MismatchPolicy,
    ParameterKind,
    ParameterSpec,
    ParameterValue,
    Recipe,
    Rule,
    RuleDType,
    Scalar,
)
from streammerge.recipe.varying import is_varying, iter_varying_problems, value_at


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


@dataclass(frozen=True, slots=True)
class Position:
    """Where an output tensor stands among the layers."""

    depth: float = 0.0
    """From 0, the first layer of its slice, to 1, the last one; 0 outside of all layers."""
    part: int | None = None
    """Index into :attr:`Recipe.layers`; None where the recipe has none."""
    names: tuple[str, ...] = ()
    """The tensor's name in each source that is merged; empty where all have that of the output."""


_EVERYWHERE = Position()


def _everywhere(_: str) -> Position:
    return _EVERYWHERE


def build_resolver(
    recipe: Recipe,
    specs: tuple[ParameterSpec, ...],
    position_of: Callable[[str], Position] = _everywhere,
) -> Callable[[str], Resolved]:
    """Return a function from a tensor name to its settings, which compiles each glob once.

    Args:
        recipe: The parsed recipe.
        specs: The parameters of the recipe's method.
        position_of: Where a tensor stands among the layers.

    Raises:
        RecipeError: A parameter has neither a value nor a default.
    """
    # The text of a value tells 0.0 from -0.0 and 1 from True, which compare equal.
    shared: dict[str, Resolved] = {}
    # fnmatchcase, without its cache of 256 patterns.
    by_glob = [(re.compile(fnmatch.translate(rule.tensors)).match, rule) for rule in recipe.rules]
    settled: dict[tuple[int | None, Position, str], Resolved] = {}
    by_name = bool(recipe.layers) or _varies(recipe)

    def resolve_tensor(tensor_name: str) -> Resolved:
        index = next((i for i, (fits, _) in enumerate(by_glob) if fits(tensor_name)), None)
        position = position_of(tensor_name) if by_name else _EVERYWHERE
        # Without values that vary there are only as many settings as rules, and one more.
        key = (index, position, tensor_name if by_name else "")
        if key not in settled:
            rule = None if index is None else recipe.rules[index]
            made = _Settling(recipe, rule, position, tensor_name).settle(specs)
            settled[key] = shared.setdefault(repr(made), made)
        return settled[key]

    # A missing value is an error whatever the tensors are.
    for index in (None, *range(len(recipe.rules))):
        if not by_name:
            rule = None if index is None else recipe.rules[index]
            made = _Settling(recipe, rule, _EVERYWHERE, "").settle(specs)
            settled[index, _EVERYWHERE, ""] = shared.setdefault(repr(made), made)
    if not by_glob and not by_name:
        everywhere = settled[None, _EVERYWHERE, ""]
        return lambda _: everywhere
    return resolve_tensor


def _varies(recipe: Recipe) -> bool:
    """Return whether any value of a recipe differs between tensors."""
    return any(isinstance(value, Gradient | Cases) for value in _iter_values(recipe))


def has_gradients(recipe: Recipe) -> bool:
    """Return whether any value of a recipe changes from layer to layer."""
    return is_gradual(_iter_values(recipe))


def is_gradual(given: Iterable[Given]) -> bool:
    """Return whether any of some values changes from layer to layer."""
    values = [
        each
        for value in given
        for each in ((case.value for case in value.cases) if isinstance(value, Cases) else (value,))
    ]
    return any(isinstance(each, Gradient) for each in values)


def _iter_values(recipe: Recipe) -> Iterator[Given]:
    """Yield all that a recipe says about parameters."""
    yield from recipe.parameters.values()
    for source in recipe.sources:
        yield from source.parameters.values()
    for rule in recipe.rules:
        yield from rule.parameters.values()
    for part in recipe.layers:
        yield from part.parameters.values()
        for each in part.ranges:
            yield from each.parameters.values()


@dataclass(frozen=True, slots=True)
class _Settling:
    """Finds the settings of the tensors under one rule, or under none, at one position."""

    recipe: Recipe
    rule: Rule | None
    position: Position
    name: str

    def settle(self, specs: tuple[ParameterSpec, ...]) -> Resolved:
        rule, recipe = self.rule, self.recipe
        return Resolved(
            copy=None if rule is None else rule.copy,
            drop=rule is not None and rule.drop,
            keeps_dtype=rule is not None and rule.dtype is RuleDType.KEEP,
            common=((rule and rule.mismatch) or recipe.mismatch) is MismatchPolicy.COMMON,
            values=tuple((spec.name, self._value(spec)) for spec in specs),
        )

    def _value(self, spec: ParameterSpec) -> ParameterValue:
        default = spec.default_of(self.recipe.semantics)
        if not spec.per_source:
            value = self._first(self._levels(spec.name, None), self.name, None)
            if value is None and default is None:
                raise RecipeError(f"parameters.{spec.name}: {self._lacking(spec)}")
            return default if value is None else value  # type: ignore[return-value]
        each: list[Scalar] = []
        part = self._part
        sources = range(len(self.recipe.sources)) if part is None else part.sources
        for place, source in enumerate(sources):
            name = self.position.names[place] if self.position.names else self.name
            value = self._first(self._levels(spec.name, source), name, source)
            value = default if value is None else value
            if value is None:
                raise RecipeError(f"sources[{source}].{spec.name}: {self._lacking(spec)}")
            each.append(value)
        return tuple(each)

    def _lacking(self, spec: ParameterSpec) -> str:
        if not self.name:
            return "this key is required"
        return (
            f"no value for {printable(self.name)}, and no default; give the others a value as the last "
            f"case, {{value: …}}"
            if any(isinstance(each, Cases) for each in self._levels(spec.name, None))
            else "this key is required"
        )

    @property
    def _part(self) -> LayerSlice | None:
        part = self.position.part
        return None if part is None else self.recipe.layers[part]

    def _levels(self, name: str, source: int | None) -> Iterator[Given | None]:
        """Yield what the recipe says about a parameter, of a source if given, the nearest first."""
        part = self._part
        if self.rule is not None:
            yield self.rule.parameters.get(name)
        if part is not None:
            own = (each for each in part.ranges if each.source == source)
            yield from (each.parameters.get(name) for each in own)
            yield part.parameters.get(name)
        if source is not None:
            yield self.recipe.sources[source].parameters.get(name)
        yield self.recipe.parameters.get(name)

    def _first(
        self, levels: Iterator[Given | None], name: str, source: int | None
    ) -> Scalar | None:
        """Return the first value that there is."""
        for given in levels:
            # A list has a value for each source of the recipe, merged here or not.
            one = given[source] if isinstance(given, tuple) and source is not None else given
            if one is None or isinstance(one, tuple):
                continue
            value = value_at(one, name, self.position.depth)
            if value is not None:
                return value
        return None


class Place(Enum):
    """Where a parameter may stand."""

    RECIPE = "recipe"
    SOURCE = "source"
    RULE = "rule"
    SLICE = "slice of layers"
    RANGE = "source of a slice"

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
    Place.SLICE: keys_of(LayerSliceDocument),
    Place.RANGE: keys_of(LayerRangeDocument),
}


def may_stand(spec: ParameterSpec, place: Place) -> bool:
    """Return whether the parameter may be given in ``place``."""
    match place:
        case Place.SOURCE:
            return spec.per_source
        case Place.RANGE:
            return spec.per_source and spec.per_tensor
        case Place.RULE | Place.SLICE:
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
    for place, steps, table in _iter_tables(document):
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


def _iter_tables(
    document: Mapping[Any, Any],
) -> Iterator[tuple[Place, tuple[object, ...], dict[Any, Any]]]:
    """Yield every mapping of a document in which parameters may stand, with its path."""
    common = document.get("parameters", {})
    if isinstance(common, dict):
        yield Place.RECIPE, ("parameters",), common
    for index, table in tables_of(document, "sources"):
        yield Place.SOURCE, ("sources", index), table
    for index, table in tables_of(document, "rules"):
        yield Place.RULE, ("rules", index), table
    for index, table in tables_of(document, "layers"):
        yield Place.SLICE, ("layers", index), table
        for inner, each in tables_of(table, "sources"):
            yield Place.RANGE, ("layers", index, "sources", inner), each


def _refuse_place(name: object, place: Place, specs: Mapping[str, ParameterSpec]) -> str | None:
    """Return why the key ``name`` may not stand in ``place``, or None if it may."""
    spec = specs.get(name) if isinstance(name, str) else None
    if spec is None:
        allowed = [name for name, spec in specs.items() if may_stand(spec, place)]
        return unknown_key(name, [*place.other_keys, *allowed])
    if may_stand(spec, place):
        return None
    of_source = place in {Place.SOURCE, Place.RANGE} and not spec.per_source
    served = "all sources" if of_source else "the whole model"
    return f'one value serves {served}; move it to "parameters"'


def _value_problems(
    path: str, spec: ParameterSpec, value: object, place: Place, n_sources: int
) -> Iterator[str]:
    """Yield what is wrong with one parameter's value, which may be a list with one per source."""
    if is_varying(value):
        yield from iter_varying_problems(path, spec, value, partial(_refuse_scalar, spec))
        return
    of_one = place in {Place.SOURCE, Place.RANGE}
    if not (isinstance(value, list) and spec.per_source and not of_one):
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


def _gives(part: Mapping[Any, Any], spec: ParameterSpec) -> bool:
    """Return whether a slice of layers gives a parameter, for all of its sources or for each."""
    if spec.name in part:
        return True
    sources = [each for _, each in tables_of(part, "sources") if each.get("source") != "base"]
    return spec.per_source and all(spec.name in each for each in sources)


def _only_bases(document: Mapping[Any, Any]) -> set[object]:
    """Return the sources that are never merged: slices of layers only compare others with them."""
    slices = [table for _, table in tables_of(document, "layers")]
    merged = {each.get("source") for part in slices for _, each in tables_of(part, "sources")}
    own = [part["base"] for part in slices if isinstance(part.get("base"), dict)]
    return {each.get("source") for each in own} - merged


def _missing_problems(
    document: Mapping[Any, Any], common: Mapping[Any, Any], specs: tuple[ParameterSpec, ...]
) -> Iterator[str]:
    """Yield the parameters that have no default and are not given for some source."""
    for spec in specs:
        if spec.default is not None or spec.name in common:
            continue
        why = f"this key is required, as {document.get('method')} has no default for it"
        slices = [table for _, table in tables_of(document, "layers")]
        if slices and all(_gives(part, spec) for part in slices):
            continue
        if not spec.per_source:
            yield f"parameters.{spec.name}: {why}"
            continue
        bases = _only_bases(document)
        for index, source in tables_of(document, "sources"):
            if spec.name not in source and index not in bases:
                path = f"sources[{index}].{spec.name}"
                where = f'here, for {shown(source.get("path"))}, or under "parameters" for all'
                yield f"{path}: {why}; give it {where}"
