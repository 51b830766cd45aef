"""Parts of a model that mergekit's key ``modules`` lists, each with parameters of its own, as rules do.

What the parts are called is a matter of mergekit's tables of architectures, which this tool does not
have. ``default`` is a whole model, or what is in no other part. Parts that are merged alike are one.
Else a part has the tensors whose names begin with its own, and at most one part has all the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from streammerge.recipe.dialects.methods import NUSLERP_SWITCHES, Foreign
from streammerge.recipe.dialects.parameters import check_idle, translate_parameters
from streammerge.recipe.dialects.reading import Reader
from streammerge.recipe.dialects.references import Reference
from streammerge.recipe.dialects.values import chained, is_for_all, literally
from streammerge.recipe.refusing import shown, unknown_key
from streammerge.recipe.types import ParameterSpec, Semantics
from streammerge.recipe.varying import CASES, GRADIENT

WHOLE = "default"
"""The only module of most architectures."""
_REMAINING = (WHOLE, "text_decoder", "shared")
"""Modules that have what no other one's name begins: loose tensors where mergekit finds out the modules
by itself, the text model of one that sees, embedding and head of T5."""
_KEYS = ("models", "slices", "parameters")


@dataclass(frozen=True, slots=True)
class Merged:
    """A model that is merged."""

    reference: Reference
    """Which one."""
    path: str
    """Where its parameters stand."""
    values: Mapping[str, Any]
    """They, by their names here."""


@dataclass(frozen=True, slots=True)
class Part:
    """A module as a recipe lists it, or a whole model, without a name and at the top level."""

    name: str
    """What it is called."""
    path: str
    """Where it stands."""
    table: Mapping[Any, Any]
    """Its parameters, as they are given."""
    key: str
    """``models`` or ``slices``."""
    value: object
    """What stands there."""

    @property
    def prefix(self) -> str:
        """What the paths of its keys begin with."""
        return f"{self.path}." if self.path else ""


@dataclass(frozen=True, slots=True)
class Rules:
    """What differs between modules."""

    rules: list[dict[str, Any]]
    """The value of ``rules``."""
    remaining: Part
    """The module whose models and parameters are those of the recipe, for all other tensors."""


def read_parts(reader: Reader, value: object) -> list[Part]:
    """Return the modules of a recipe; what is wrong with them is said."""
    if not isinstance(value, dict) or not value:
        got = "an empty one" if value == {} else shown(value)
        reader.found.say("modules", f"expected a mapping of modules to what they are, got {got}")
        return []
    parts = []
    for name, entry in value.items():
        path = f"modules.{name if isinstance(name, str) else shown(name)}"
        if not isinstance(entry, dict):
            reader.found.say(path, f"expected a mapping of keys to values, got {shown(entry)}")
            continue
        for key in entry:
            if key == "base_model":
                said = "a module has no base of its own; name it at the top level, for all modules"
                reader.found.say(f"{path}.{key}", said)
            elif key not in _KEYS:
                reader.found.say(f"{path}.{key}", unknown_key(key, _KEYS))
        forms = [key for key in ("models", "slices") if entry.get(key) is not None]
        if len(forms) != 1:
            got = " and ".join(forms) or "none of them"
            reader.found.say(path, f"expected models or slices, got {got}")
            continue
        table = reader.table("parameters", entry, f"{path}.")
        parts.append(Part(str(name), path, table, forms[0], entry[forms[0]]))
    if len(parts) == len(value):
        _refuse_parts(reader, parts)
    return parts


def _refuse_parts(reader: Reader, parts: Sequence[Part]) -> None:
    """Say which modules cannot be followed, whatever they merge."""
    if len(parts) == 1 and parts[0].name != WHOLE:
        reader.found.say(
            parts[0].path,
            "the only module in the recipe, without which mergekit leaves all other tensors of the model "
            "out; list the other modules too, or write what is under it at the top level to merge all",
        )
    for part in parts:
        if len(parts) > 1 and part.key == "slices":
            reader.found.say(
                f"{part.path}.slices",
                "layers of one module beside others cannot be put together; list whole models, as "
                f"{part.path}.models",
            )


def list_models(
    reader: Reader,
    value: object,
    path: str,
    method: Foreign,
    specs: tuple[ParameterSpec, ...],
    *,
    bases: tuple[Reference | None, Reference | None],
) -> list[Merged]:
    """Return the whole models that a recipe merges.

    Args:
        reader: Reads them.
        value: The list.
        path: Where it stands.
        method: The merge method.
        specs: What its parameters are here.
        bases: ``base_model``, and the same where task vectors are taken from it.
    """
    base, common = bases
    merged: list[Merged] = []
    for model in reader.listed(value, path, ("model", "parameters")):
        where = f"{model.path}.parameters"
        if model.reference == common:
            check_idle(where, model.parameters, reader.found)
        elif any(each.reference == model.reference for each in merged):
            reader.found.say(f"{model.path}.model", f"{model.reference.native} is listed twice")
        else:
            values = translate_parameters(
                where, model.parameters, method, specs, found=reader.found, model=True
            )
            merged.append(Merged(model.reference, where, values))
    if common is None and base is not None and all(each.reference != base for each in merged):
        # It is merged like the others, after them.
        merged.append(Merged(base, "base_model", {}))
        if method.keys.get("weight") is not None:
            reader.found.remark("base_model", f"{method.native} merges it as one more model")
    return merged


def translate_tables(
    reader: Reader,
    part: Part,
    table: Mapping[Any, Any],
    method: Foreign,
    specs: tuple[ParameterSpec, ...],
) -> dict[str, Any]:
    """Return the parameters for all models: those of a module before those of the recipe."""
    common = translate_parameters(
        "parameters", table, method, specs, found=reader.found, model=False
    )
    if not part.table:
        return common
    own = dict(part.table)
    if any(name in own for name in NUSLERP_SWITCHES):
        # Each of the two switches has its own precedence.
        own = {name: table[name] for name in NUSLERP_SWITCHES if name in table} | own
    path = f"{part.path}.parameters"
    nearer = translate_parameters(path, own, method, specs, found=reader.found, model=False)
    return {
        name: chained(nearer.get(name), common.get(name))
        for name in dict.fromkeys([*nearer, *common])
    }


@dataclass(frozen=True, slots=True)
class Dividing:
    """Finds out in what modules differ."""

    reader: Reader
    method: Foreign
    specs: tuple[ParameterSpec, ...]
    bases: tuple[Reference | None, Reference | None]
    table: Mapping[Any, Any]
    """The recipe's parameters."""
    paths: dict[str, str]
    """Gets where a mapping of the document stands in mergekit's recipe."""

    def divide(self, parts: Sequence[Part]) -> Rules | None:
        """Return the rules for all modules but one; None if there is something that none can say."""
        before = len(self.reader.found.problems)
        listed = [self._models(part) for part in parts]
        self._check_models(parts, listed)
        values = [self._values(part, models) for part, models in zip(parts, listed, strict=True)]
        if len(self.reader.found.problems) > before:
            return None
        if all(each == values[0] for each in values) and not _gradual(values[0]):
            self.reader.found.remark(
                "modules",
                "all are merged alike, and so are tensors of modules that are not listed; mergekit leaves "
                "those out",
            )
            return Rules([], parts[0])
        index = self._find_remaining(parts)
        if index is None:
            return None
        rules = list(self._rules(parts, values, index))
        return Rules(rules, parts[index])

    def _models(self, part: Part) -> list[Merged]:
        return list_models(
            self.reader,
            part.value,
            f"{part.path}.models",
            self.method,
            self.specs,
            bases=self.bases,
        )

    def _check_models(self, parts: Sequence[Part], listed: Sequence[Sequence[Merged]]) -> None:
        """Say which modules are merged of other models than the first one."""
        wanted = [each.reference for each in listed[0]]
        for part, models in zip(parts, listed, strict=True):
            given = [each.reference for each in models]
            if given == wanted or not given:
                continue
            first, other = (
                ", ".join(each.native for each in some) or "no model" for some in (wanted, given)
            )
            self.reader.found.say(
                f"{part.path}.models",
                f"{other}, where {parts[0].path} has {first}; modules can have parameters of their own, not "
                "models: list the same ones in the same order, with a weight of 0 for what is not wanted, or "
                f'write a native recipe with a rule {{tensors: "{part.name}.*", copy: 0}}',
            )

    def _values(self, part: Part, models: Sequence[Merged]) -> dict[str, list[Any]]:
        """Return the values of every parameter in a module: one, or one for each model."""
        common = translate_tables(self.reader, part, self.table, self.method, self.specs)
        keys = {key.native: key for key in self.method.keys.values()}
        made: dict[str, list[Any]] = {}
        for spec in self.specs:
            key = keys.get(spec.name)
            default = None if key is None else key.default
            if default is None and not (key and key.required):
                default = spec.default_of(Semantics.MERGEKIT)
            last = chained(common.get(spec.name), default)
            each = key is not None and key.of_model
            levels = [model.values.get(spec.name) for model in models] if each else [None]
            made[spec.name] = [chained(own, last) for own in levels]
            if key is not None and key.required and not all(map(is_for_all, made[spec.name])):
                name = next(foreign for foreign, k in self.method.keys.items() if k is key)
                self.reader.found.say(
                    f"{part.path}.parameters.{name}",
                    "this key is required, here, for each model or under parameters for all",
                )
        return made

    def _find_remaining(self, parts: Sequence[Part]) -> int | None:
        """Return which module has the tensors that no other one's name begins."""
        found = [index for index, part in enumerate(parts) if part.name in _REMAINING]
        if len(found) == 1:
            return found[0]
        which = ", ".join(parts[index].name for index in found) or "none"
        self.reader.found.say(
            "modules",
            "a module has the tensors whose names begin with its own, and one of default, text_decoder and "
            f"shared has all others; the recipe lists {which} of these; give all modules the same "
            "parameters, or write a native recipe with rules by names of tensors",
        )
        return None

    def _rules(
        self, parts: Sequence[Part], values: Sequence[Mapping[str, list[Any]]], remaining: int
    ) -> Iterator[dict[str, Any]]:
        """Yield what differs from the module that has the remaining tensors."""
        own = [index for index in range(len(parts)) if index != remaining]
        # The longer name first: a module's may begin with another one's.
        own.sort(key=lambda index: -len(parts[index].name))
        for place, index in enumerate(own):
            part = parts[index]
            rule: dict[str, Any] = {"tensors": f"{literally(part.name)}.*"}
            # A rule has to say something, also where it says again what holds for the others.
            others = values[remaining]
            # A gradient runs over the layers of each module.
            differing = [
                name
                for name, each in values[index].items()
                if each != others[name] or _gradual({name: each})
            ]
            for name in differing or self._anything(values[index]):
                rule |= self._value(part, name, values[index][name])
            self.paths[f"rules[{place}]"] = f"{part.path}.parameters"
            self.paths[f"rules[{place}].tensors"] = part.path
            self.reader.found.remark(part.path, f"the tensors whose names begin with {part.name}.")
            yield rule
        self.reader.found.remark(
            parts[remaining].path,
            "all other tensors; mergekit leaves those of modules that are not listed out",
        )

    def _anything(self, values: Mapping[str, list[Any]]) -> list[str]:
        """Return one parameter that a rule can say, the simplest one."""
        names = [spec.name for spec in self.specs if spec.per_tensor and values[spec.name]]
        some = [name for name in names if values[name][0] is not None]
        some.sort(key=lambda name: any(isinstance(value, dict) for value in values[name]))
        return some[:1]

    def _value(self, part: Part, name: str, each: list[Any]) -> dict[str, Any]:
        """Return a parameter as a rule has it."""
        if not each or each[0] is None:
            return {}
        if all(value == each[0] for value in each):
            return {name: each[0]}
        if not any(isinstance(value, dict) for value in each):
            return {name: each}
        foreign = next(key for key, its in self.method.keys.items() if its.native == name)
        self.reader.found.say(
            f"{part.path}.parameters.{foreign}",
            "in a module the models may have numbers of their own, or all the same gradient or values by "
            "names; give each model a number, all of them the same, or the same models and parameters to all "
            "modules as `models` at the top level",
        )
        return {}


def _gradual(values: Mapping[str, list[Any]]) -> bool:
    """Return whether any of the values changes from layer to layer."""
    every = [value for each in values.values() for value in each if isinstance(value, dict)]
    cases = [case["value"] for value in every for case in value.get(CASES, ())]
    return any(isinstance(value, dict) and GRADIENT in value for value in (*every, *cases))
