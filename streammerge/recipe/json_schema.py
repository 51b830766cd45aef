"""The recipe's JSON Schema, with which editors complete and explain its keys.

The shape comes from the models that the parser checks with, the parameters from the methods. Each
method has closed definitions of its own for ``parameters``, a source and a rule, chosen by
``method``: an editor that knows the method offers its parameters and nothing else, and the words for
``semantics`` that it has.

A schema cannot count: that a list has one value per source and that ``copy`` names an existing
source is checked by the parser alone. Everything else it refuses, the parser refuses too, but for
semantics that a method does not have: the planner does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from streammerge.recipe.grid import GRID_KEY
from streammerge.recipe.resolving import Place, may_stand
from streammerge.recipe.schema import RecipeDocument
from streammerge.recipe.types import CompanionKind, ParameterKind, ParameterSpec, Semantics

JsonSchema = dict[str, Any]
"""A schema, or a part of one, as plain JSON values."""

_GRID: JsonSchema = {
    "type": "object",
    "description": "Makes one output per combination of values, from one read of the inputs. A key is "
    "the way to a value, such as parameters.density or sources.0.weight.",
    "minProperties": 1,
    "propertyNames": {"pattern": r"^[^.]+(\.[^.]+)*$"},
    "additionalProperties": {"type": "array", "minItems": 1},
}


def recipe_json_schema(
    methods: Mapping[str, tuple[ParameterSpec, ...]],
    semantics: Mapping[str, Sequence[Semantics]] = MappingProxyType({}),
) -> JsonSchema:
    """Return the JSON Schema, draft 2020-12, of a recipe that uses one of ``methods``.

    Args:
        methods: Every known method's parameters.
        semantics: Whose definitions of a method there are, the default first; any for a method
            that is not here.
    """
    schema = _without_titles(RecipeDocument.model_json_schema())
    shapes = schema.pop("$defs")
    properties = schema["properties"]
    source, rule = shapes.pop("SourceDocument"), shapes.pop("RuleDocument")
    part, layers = shapes.pop("LayerSliceDocument"), shapes.pop("LayerRangeDocument")
    # What the method decides is closed in its own definitions; here it must stay open to them.
    properties["method"]["enum"] = sorted(methods)
    properties["sources"]["items"] = {"type": "object"}
    properties["rules"]["items"] = {"type": "object"}
    properties["layers"]["items"] = {"type": "object"}
    properties[GRID_KEY] = _GRID
    for name, specs in methods.items():
        shapes[f"{name}.parameters"] = _parameters(specs, semantics.get(name, ()))
        shapes[f"{name}.source"] = _with_parameters(source, specs, Place.SOURCE)
        shapes[f"{name}.rule"] = _rule(rule, specs)
        shapes[f"{name}.range"] = _with_parameters(layers, specs, Place.RANGE)
        shapes[f"{name}.slice"] = _slice(part, name, specs)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "streammerge recipe",
        **schema,
        "allOf": [
            *(_choice(name, methods[name], semantics.get(name, ())) for name in sorted(methods)),
            *_base_needed(),
        ],
        "$defs": shapes,
    }


def _without_titles(schema: Any) -> Any:
    """Return ``schema`` without pydantic's titles, which repeat the keys; no key is a title."""
    if isinstance(schema, dict):
        return {key: _without_titles(value) for key, value in schema.items() if key != "title"}
    return [_without_titles(value) for value in schema] if isinstance(schema, list) else schema


def _choice(
    method: str, specs: tuple[ParameterSpec, ...], semantics: Sequence[Semantics]
) -> JsonSchema:
    """Return what holds for the document once its method is known."""
    chosen: JsonSchema = {
        "properties": {
            "parameters": {"$ref": f"#/$defs/{method}.parameters"},
            "sources": {"items": {"$ref": f"#/$defs/{method}.source"}},
            "rules": {"items": {"$ref": f"#/$defs/{method}.rule"}},
            "layers": {"items": {"$ref": f"#/$defs/{method}.slice"}},
        }
    }
    if semantics:
        words = [each.value for each in semantics]
        chosen["properties"]["semantics"] = {"enum": [*words, None], "default": words[0]}
    required = [_given(spec) for spec in specs if spec.default is None]
    if required:
        chosen["allOf"] = required
    return {
        "if": {"properties": {"method": {"const": method}}, "required": ["method"]},
        "then": chosen,
    }


def _given(spec: ParameterSpec) -> JsonSchema:
    """Return that a parameter without a default is given: for all sources, or for each."""
    for_all = {
        "properties": {"parameters": {"required": [spec.name]}},
        "required": ["parameters"],
    }
    by_grid = {"required": [GRID_KEY]}
    if not spec.per_source:
        return {"anyOf": [for_all, by_grid]}
    for_each = {"properties": {"sources": {"items": {"required": [spec.name]}}}}
    return {"anyOf": [for_all, for_each, by_grid]}


def _parameters(specs: tuple[ParameterSpec, ...], semantics: Sequence[Semantics]) -> JsonSchema:
    """Return the closed mapping of a method's parameters for all tensors."""
    properties = {spec.name: _value(spec, Place.RECIPE) for spec in specs}
    for spec in specs:
        default = spec.default_of(semantics[0] if semantics else None)
        if default is not None:
            properties[spec.name]["default"] = default
        for each in semantics[1:]:
            if (other := spec.default_of(each)) != default:
                said = properties[spec.name]["description"]
                properties[spec.name]["description"] = (
                    f"{said} Under `semantics: {each.value}` the default is {json.dumps(other)}."
                )
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _with_parameters(
    shape: JsonSchema, specs: tuple[ParameterSpec, ...], place: Place
) -> JsonSchema:
    """Return a closed source or rule with the parameters that may stand beside its own keys."""
    parameters = {spec.name: _value(spec, place) for spec in specs if may_stand(spec, place)}
    return shape | {"properties": shape["properties"] | parameters}


def _slice(shape: JsonSchema, method: str, specs: tuple[ParameterSpec, ...]) -> JsonSchema:
    """Return a slice of layers, whose sources have parameters too."""
    made = _with_parameters(shape, specs, Place.SLICE)
    sources = made["properties"]["sources"] | {"items": {"$ref": f"#/$defs/{method}.range"}}
    return made | {"properties": made["properties"] | {"sources": sources}}


def _rule(shape: JsonSchema, specs: tuple[ParameterSpec, ...]) -> JsonSchema:
    """Return a rule that does exactly one thing: copy, drop, or change parameters."""
    copies = {"properties": {"copy": {"not": {"type": "null"}}}, "required": ["copy"]}
    drops = {"properties": {"drop": {"const": True}}, "required": ["drop"]}
    changes = [{"required": [spec.name]} for spec in specs if may_stand(spec, Place.RULE)]
    changes += [{"required": ["dtype"]}, {"required": ["mismatch"]}]
    of_copies = {"propertyNames": {"enum": ["tensors", "copy", "drop", "dtype"]}}
    of_drops = {"propertyNames": {"enum": ["tensors", "copy", "drop"]}}
    return _with_parameters(shape, specs, Place.RULE) | {
        "anyOf": [copies, drops, *changes],
        "allOf": [
            {"not": {"allOf": [copies, drops]}},
            {"if": copies, "then": of_copies},
            {"if": drops, "then": of_drops},
        ],
    }


def _value(spec: ParameterSpec, place: Place) -> JsonSchema:
    """Return a parameter's value: one, or outside of a source also a list with one per source."""
    match spec.kind:
        case ParameterKind.FLOAT | ParameterKind.INT:
            # A schema takes 2.0 for an integer; the parser does not.
            one: JsonSchema = {"type": "number" if spec.kind is ParameterKind.FLOAT else "integer"}
            if spec.minimum is not None:
                one["minimum"] = spec.minimum
            if spec.maximum is not None:
                one["maximum"] = spec.maximum
        case ParameterKind.BOOL:
            one = {"type": "boolean"}
        case ParameterKind.CHOICE:
            one = {"type": "string", "enum": list(spec.choices)}
    varying = _varying(spec, one) if spec.per_tensor else []
    if spec.per_source and place not in {Place.SOURCE, Place.RANGE}:
        each = {"type": "array", "items": one, "minItems": 1}
        said = f"{spec.doc} A list has one value per source."
        return {"description": said, "anyOf": [one, each, *varying]}
    if varying:
        return {"description": spec.doc, "anyOf": [one, *varying]}
    return {"description": spec.doc, **one}


def _varying(spec: ParameterSpec, one: JsonSchema) -> list[JsonSchema]:
    """Return the values that differ between tensors: gradients and cases."""
    values = {"type": "array", "items": one, "minItems": 1}
    gradient = {
        "type": "object",
        "properties": {"gradient": values},
        "required": ["gradient"],
        "additionalProperties": False,
    }
    gradients = [] if spec.kind is ParameterKind.INT else [gradient]
    case = {
        "type": "object",
        "properties": {
            "tensors": {"type": ["string", "null"], "minLength": 1},
            "value": {"anyOf": [one, *gradients]},
        },
        "required": ["value"],
        "additionalProperties": False,
    }
    cases = {
        "type": "object",
        "properties": {"cases": {"type": "array", "items": case, "minItems": 1}},
        "required": ["cases"],
        "additionalProperties": False,
    }
    return [*gradients, cases]


def _of_kind(kind: CompanionKind) -> JsonSchema:
    """Return that files of a kind are taken from the base."""
    return {
        "type": "object",
        "properties": {kind.value: {"const": "base"}},
        "required": [kind.value],
    }


def _base_needed() -> list[JsonSchema]:
    """Return that whatever takes tensors from the base requires that there is one."""
    copies = {"properties": {"copy": {"const": "base"}}, "required": ["copy"]}
    conditions = [
        {"properties": {"rules": {"contains": copies}}, "required": ["rules"]},
        {"properties": {"missing": {"const": "base"}}, "required": ["missing"]},
        *(
            {
                "properties": {
                    "output": {"properties": {"companions": taken}, "required": ["companions"]}
                },
                "required": ["output"],
            }
            for taken in ({"const": "base"}, *map(_of_kind, CompanionKind))
        ),
    ]
    there = {"properties": {"base": {"type": "string"}}, "required": ["base"]}
    return [{"if": condition, "then": there} for condition in conditions]
