"""Recipes written down: whole for machines, short for people."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from streammerge.errors import printable
from streammerge.recipe.accepting import PROMOTED
from streammerge.recipe.mixture import plain_mixture
from streammerge.recipe.text import dump_document
from streammerge.recipe.types import (
    BASE,
    CompanionKind,
    Given,
    LayerRange,
    LayerSlice,
    Recipe,
    Rename,
    Rule,
)
from streammerge.recipe.varying import plain_varying
from streammerge.recipe.vocabulary import plain_vocabulary
from streammerge.storage.urls import spelled

_UNSAID: Mapping[str, object] = {
    "parameters": {},
    "rules": [],
    "seed": 0,
    "missing": "error",
    "mismatch": "error",
    "non_finite": "error",
    "vocabulary": "error",
    "compute_dtype": "float32",
    "output": {},
}
"""What a recipe means that does not have the key."""


def dump_recipe(recipe: Recipe) -> str:
    """Return ``recipe`` as YAML that parses back to an equal recipe; equal recipes, equal text."""
    return dump_document(_document(recipe))


def write_out(recipe: Recipe) -> str:
    """Return ``recipe`` as YAML for people: without what goes without saying, and with its remarks."""
    said = {key: value for key, value in _document(recipe).items() if value != _UNSAID.get(key)}
    remarks = [f"# {printable(remark)}\n" for remark in recipe.remarks]
    return "".join(remarks) + dump_document(said)


def _document(recipe: Recipe) -> dict[str, object]:
    """Return a recipe as plain values, with every default."""
    document: dict[str, object] = {"method": recipe.method}
    if recipe.base is not None:
        document["base"] = spelled(recipe.base)
    if recipe.base is not None and recipe.base_adapter is not None:
        document["base"] = {
            "path": spelled(recipe.base),
            "adapter": spelled(recipe.base_adapter),
        }
    document["sources"] = [
        {"path": spelled(source.path)}
        | ({} if source.adapter is None else {"adapter": spelled(source.adapter)})
        | ({} if source.component is None else {"component": source.component})
        | ({} if not source.rename else {"rename": list(map(_plain_rename, source.rename))})
        | _plain(source.parameters)
        for source in recipe.sources
    ]
    document["parameters"] = _plain(recipe.parameters)
    document["rules"] = [_plain_rule(rule) for rule in recipe.rules]
    if recipe.layers:
        document["layers"] = list(map(_plain_slice, recipe.layers))
    if recipe.mixture is not None:
        document["mixture"] = plain_mixture(recipe.mixture)
    if recipe.semantics is not None:
        document["semantics"] = recipe.semantics.value
    document["seed"] = recipe.seed
    document["missing"] = recipe.missing.value
    document["mismatch"] = recipe.mismatch.value
    document["non_finite"] = recipe.non_finite.value
    document["vocabulary"] = plain_vocabulary(recipe.vocabulary)
    document["compute_dtype"] = recipe.compute_dtype.value
    output: dict[str, object] = {}
    if recipe.output.max_shard_bytes is not None:
        output["max_shard_size"] = recipe.output.max_shard_bytes
    if recipe.output.dtype is not None:
        output["dtype"] = recipe.output.dtype.torch_name
    elif recipe.output.promotes:
        output["dtype"] = PROMOTED
    if recipe.output.companions:
        output["companions"] = {
            kind.value: _plain_origin(recipe.output.companions[kind])
            for kind in CompanionKind
            if kind in recipe.output.companions
        }
    if recipe.output.chat_template is not None:
        output["chat_template"] = recipe.output.chat_template
    if recipe.output.quantization is not None:
        output["quantization"] = recipe.output.quantization.value
    document["output"] = output
    return document


def _plain(parameters: Mapping[str, Given]) -> dict[str, object]:
    """Return ``parameters`` as YAML has them, sorted, so that equal recipes have equal text."""
    return {
        name: list(value) if isinstance(value, tuple) else plain_varying(value)
        for name, value in sorted(parameters.items())
    }


def _plain_rename(rename: Rename) -> dict[str, str]:
    return {"from": rename.old, "to": rename.new}


def _plain_origin(origin: int | Path) -> object:
    if origin == BASE:
        return "base"
    return origin if isinstance(origin, int) else spelled(origin)


def _plain_rule(rule: Rule) -> dict[str, object]:
    plain: dict[str, object] = {"tensors": rule.tensors}
    if rule.copy is not None:
        plain["copy"] = "base" if rule.copy == BASE else rule.copy
    if rule.drop:
        plain["drop"] = True
    if rule.dtype is not None:
        plain["dtype"] = rule.dtype.value
    if rule.mismatch is not None:
        plain["mismatch"] = rule.mismatch.value
    return plain | _plain(rule.parameters)


def _plain_slice(part: LayerSlice) -> dict[str, object]:
    sources = [_plain_range(each) for each in part.ranges]
    base = {} if part.base is None else {"base": _plain_range(part.base)}
    return {"sources": sources} | base | _plain(part.parameters)


def _plain_range(each: LayerRange) -> dict[str, object]:
    layers = {"source": _plain_origin(each.source), "layers": [each.first, each.end]}
    return layers | _plain(each.parameters)
