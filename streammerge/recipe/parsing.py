"""Recipe text to :class:`Recipe` and back.

Text becomes plain values, the keys that all methods share are checked by the models of ``schema``,
the rest against the parameters that the method declares. Everything found wrong is reported at
once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streammerge.errors import RecipeError, suggestion
from streammerge.recipe.accepting import PROMOTED
from streammerge.recipe.dialects.recognising import is_mergekit
from streammerge.recipe.mixture import iter_mixture_problems
from streammerge.recipe.refusing import key_path, shown
from streammerge.recipe.resolving import Place, iter_parameter_problems, tables_of
from streammerge.recipe.schema import BaseDocument, LayerSliceDocument, RecipeDocument, check_frame
from streammerge.recipe.text import load_document
from streammerge.recipe.types import (
    Given,
    LayerRange,
    LayerSlice,
    OutputSpec,
    ParameterKind,
    ParameterSpec,
    Recipe,
    Rename,
    Rule,
    Scalar,
    Source,
    Varying,
    with_keys,
)
from streammerge.recipe.varying import build_varying
from streammerge.recipe.vocabulary import iter_vocabulary_problems

if TYPE_CHECKING:
    from streammerge.recipe.dialects.mergekit import Translated

MAX_PROBLEMS = 100
"""Lines in one error message."""

Methods = Mapping[str, tuple[ParameterSpec, ...]]
"""The parameters of every known method, by its name."""


def parse_recipe(text: str, *, origin: str, methods: Methods) -> Recipe:
    """Return the recipe that ``text`` holds, as YAML 1.2 or JSON.

    Args:
        text: One YAML document.
        origin: What to call the text in messages: a file name.
        methods: Every known method's parameters.

    Raises:
        RecipeError: The text is not YAML, or not a recipe; one line for each problem.
    """
    return recipe_from_mapping(load_document(text, origin=origin), origin=origin, methods=methods)


def recipe_from_mapping(document: object, *, origin: str, methods: Methods) -> Recipe:
    """Return the recipe that ``document`` holds as plain dicts, lists, texts and numbers.

    Args:
        document: The keys and values that a YAML recipe would have.
        origin: What to call the document in messages.
        methods: Every known method's parameters.

    Raises:
        RecipeError: The document is not a recipe; one line for each problem.
    """
    with _naming(origin):
        return _translate(document, methods)


def native_document(document: object, *, origin: str, methods: Methods) -> object:
    """Return a document of mergekit's in this tool's words, and any other as it is.

    Args:
        document: Plain values, as yet unchecked.
        origin: What to call the document in messages.
        methods: Every known method's parameters.

    Raises:
        RecipeError: The document is mergekit's, and asks for what there is not.
    """
    if not isinstance(document, dict) or not is_mergekit(document):
        return document
    with _naming(origin):
        return _of_mergekit(document, methods).document


@contextmanager
def _naming(origin: str) -> Iterator[None]:
    """Put the name of a document before every line of an error about it."""
    try:
        yield
    except RecipeError as error:
        lines = str(error).split("\n")
        if len(lines) > MAX_PROBLEMS:
            lines[MAX_PROBLEMS:] = [f"and {len(lines) - MAX_PROBLEMS} more problems"]
        message = "\n".join(f"{origin}: {line}" for line in lines)
        raise RecipeError(message) from error.__cause__


def _translate(document: object, methods: Methods) -> Recipe:
    """Return the recipe in ``document``; the lines of an error start at the key's path."""
    if document is None:
        raise RecipeError("the document is empty; a recipe needs at least method and sources")
    if not isinstance(document, dict):
        raise RecipeError(f"expected a mapping of keys to values, got {shown(document)}")
    if is_mergekit(document):
        return _translate_mergekit(document, methods)
    method = document.get("method")
    specs = methods.get(method) if isinstance(method, str) else None
    problems: list[str] = []
    frame = None
    try:
        frame = check_frame(_frame(document), parameter_names=[spec.name for spec in specs or ()])
    except RecipeError as error:
        problems += str(error).split("\n")
    if specs is None and isinstance(method, str):
        problems.append(f"method: unknown method {shown(method)}{suggestion(method, methods)}")
    problems += _rule_problems(document, [spec.name for spec in specs or ()])
    if specs is not None:
        problems += iter_parameter_problems(document, specs)
    if frame is None or specs is None or problems:
        raise RecipeError("\n".join(problems))
    return _build(document, frame, {spec.name: spec for spec in specs})


def _of_mergekit(document: dict[Any, Any], methods: Methods) -> Translated:
    # Ten modules that a recipe of this tool needs none of.
    from streammerge.recipe.dialects.mergekit import translate  # noqa: PLC0415 - see above

    return translate(document, methods)


def _translate_mergekit(document: dict[Any, Any], methods: Methods) -> Recipe:
    """Return mergekit's recipe; the lines of an error start at the path of its key there."""
    translated = _of_mergekit(document, methods)
    try:
        recipe = _translate(translated.document, methods)
    except RecipeError as error:
        lines = (with_keys(line, translated.paths) for line in str(error).split("\n"))
        raise RecipeError("\n".join(lines)) from error.__cause__
    return replace(recipe, remarks=translated.remarks, keys=translated.paths)


def _frame(document: dict[Any, Any]) -> dict[object, object]:
    """Return ``document`` without what only the method can judge: its parameters."""
    frame = dict(document)
    if isinstance(frame.get("parameters"), dict):
        del frame["parameters"]
    for key, place in (
        ("sources", Place.SOURCE),
        ("rules", Place.RULE),
        ("layers", Place.SLICE),
    ):
        frame = _stripped(frame, key, place)
    if isinstance(frame.get("layers"), list):
        frame["layers"] = [
            _stripped(each, "sources", Place.RANGE) if isinstance(each, dict) else each
            for each in frame["layers"]
        ]
    return frame


def _stripped(table: dict[Any, Any], key: str, place: Place) -> dict[object, object]:
    """Return a mapping in whose list at ``key`` the entries have no parameters."""
    if not isinstance(table.get(key), list):
        return table
    entries = [
        {name: value for name, value in entry.items() if name in place.other_keys}
        if isinstance(entry, dict)
        else entry
        for entry in table[key]
    ]
    return table | {key: entries}


def _rule_problems(document: dict[Any, Any], parameter_names: list[str]) -> Iterator[str]:
    """Yield what is wrong with rules whose keys are each fine."""
    sources = document.get("sources")
    n_sources = len(sources) if isinstance(sources, list) else 0
    for index, rule in tables_of(document, "rules"):
        copy = rule.get("copy")
        drop = rule.get("drop") is True
        if copy is not None and drop:
            yield f"rules[{index}]: copy and drop exclude each other; keep one of them"
        elif copy is not None or drop:
            word = "dropped" if drop else "copied"
            idle = {*parameter_names, "mismatch", *(["dtype"] if drop else [])}
            for name in (name for name in rule if name in idle):
                yield f"{key_path('rules', index, name)}: no effect on {word} tensors; remove it"
        elif all(name in {"tensors", "copy", "drop"} for name in rule):
            yield (
                f"rules[{index}]: expected copy, drop, dtype, mismatch or a parameter to change, got "
                "none of them"
            )
        path = f"rules[{index}].copy"
        if copy == "base" and document.get("base") is None:
            yield f'{path}: the recipe has no base to copy from; add the key "base"'
        # A wrong type is the frame's to report; True is an int for Python alone.
        if isinstance(copy, int) and not isinstance(copy, bool) and copy >= n_sources > 0:
            yield (
                f"{path}: expected the index of one of {n_sources} sources, 0 to {n_sources - 1}, "
                f"got {shown(copy)}"
            )
    yield from _layer_problems(document, n_sources)
    yield from _origin_problems(document, n_sources)
    yield from iter_vocabulary_problems(document, n_sources)
    yield from iter_mixture_problems(document, n_sources)
    if document.get("missing") == "base" and document.get("base") is None:
        yield 'missing: the recipe has no base to take tensors from; add the key "base"'


def _layer_problems(document: dict[Any, Any], n_sources: int) -> Iterator[str]:
    """Yield what is wrong with slices of layers whose keys are each fine."""
    for index, table in tables_of(document, "layers"):
        yield from _layer_base_problems(f"layers[{index}].base", table, document, n_sources)
        given: dict[object, int] = {}
        counts: dict[int, int] = {}
        for place, each in tables_of(table, "sources"):
            path = f"layers[{index}].sources[{place}]"
            source, layers = each.get("source"), each.get("layers")
            if source == "base" and document.get("base") is None:
                yield f'{path}.source: the recipe has no base; add the key "base"'
            if type(source) is int and source >= n_sources > 0:
                yield (
                    f"{path}.source: expected the index of one of {n_sources} sources, 0 to "
                    f"{n_sources - 1}, got {shown(source)}"
                )
            if isinstance(source, int | str) and given.setdefault(source, place) != place:
                yield (
                    f"{path}.source: {shown(source)} gives layers to this slice already; to merge layers "
                    "of one model with each other, list the model twice under sources"
                )
            if isinstance(layers, list) and len(layers) == 2 and all(map(_is_whole, layers)):
                counts[place] = layers[1] - layers[0]
        if len(set(counts.values())) > 1:
            shown_counts = ", ".join(str(count) for count in counts.values())
            yield (
                f"layers[{index}].sources: a slice takes as many layers of each model, these give "
                f"{shown_counts}"
            )
        if given and set(given) == {"base"}:
            yield f"layers[{index}].sources: a slice needs a source beside the base"


def _layer_base_problems(
    path: str, table: dict[Any, Any], document: dict[Any, Any], n_sources: int
) -> Iterator[str]:
    """Yield what is wrong with a base that a slice has of its own."""
    base = table.get("base")
    if not isinstance(base, dict):
        return
    source, layers = base.get("source"), base.get("layers")
    if document.get("base") is None:
        yield (
            f"{path}: the recipe has no base, whose tensors say what those of the result are called; add the "
            'key "base"'
        )
    if type(source) is int and source >= n_sources > 0:
        yield (
            f"{path}.source: expected the index of one of {n_sources} sources, 0 to {n_sources - 1}, got "
            f"{shown(source)}"
        )
    for _, each in tables_of(table, "sources"):
        given, other = each.get("source"), each.get("layers")
        if given == "base":
            yield f"{path}: the recipe's base gives layers to this slice too; keep one of the two"
        elif type(source) is int and given == source:
            yield (
                f"{path}.source: {source} is merged into this slice too; to merge layers of the model that "
                "they are compared with, list it twice under sources"
            )
        counts = [
            end - first
            for each in (layers, other)
            if isinstance(each, list) and len(each) == 2 and all(map(_is_whole, each))
            for first, end in [each]
        ]
        if len(set(counts)) > 1:
            yield f"{path}.layers: the slice has {counts[1]} layers, these are {counts[0]}"
            return


def _is_whole(value: object) -> bool:
    return type(value) is int


def _origin_problems(document: dict[Any, Any], n_sources: int) -> Iterator[str]:
    """Yield which files beside the tensors come from a model that the recipe does not have."""
    output = document.get("output")
    given = output.get("companions") if isinstance(output, dict) else None
    quantization = output.get("quantization") if isinstance(output, dict) else None
    if quantization is not None and document.get("base") is None:
        yield (
            "output.quantization: the recipe has no base whose codes and scales could be followed; add "
            'the key "base", or leave this one out'
        )
    each = given if isinstance(given, dict) else {None: given}
    for kind, origin in each.items():
        path = "output.companions" if kind is None else key_path("output", "companions", kind)
        if origin == "base" and document.get("base") is None:
            yield f'{path}: the recipe has no base to take files from; add the key "base"'
        if isinstance(origin, int) and not isinstance(origin, bool) and origin >= n_sources > 0:
            yield (
                f"{path}: expected the index of one of {n_sources} sources, 0 to {n_sources - 1}, "
                f"got {shown(origin)}"
            )


def _path_of(base: str | BaseDocument) -> str:
    return base.path if isinstance(base, BaseDocument) else base


def _build(
    document: dict[Any, Any], frame: RecipeDocument, specs: Mapping[str, ParameterSpec]
) -> Recipe:
    """Return the recipe in a ``document`` that was found to be right."""
    return Recipe(
        method=frame.method,
        base=None if frame.base is None else Path(_path_of(frame.base)),
        base_adapter=Path(frame.base.adapter) if isinstance(frame.base, BaseDocument) else None,
        sources=tuple(
            Source(
                path=Path(source["path"]),
                parameters={
                    name: _varying(specs[name], source[name]) for name in source if name in specs
                },
                adapter=None if shape.adapter is None else Path(shape.adapter),
                component=shape.component,
                rename=tuple(Rename(each.old, each.new) for each in shape.rename),
            )
            for shape, source in zip(frame.sources, document["sources"], strict=True)
        ),
        parameters=_values(document.get("parameters", {}), specs),
        rules=tuple(
            Rule(
                tensors=rule.tensors,
                parameters=_values(table, specs),
                copy=rule.copy_from,
                drop=rule.drop,
                dtype=rule.dtype,
                mismatch=rule.mismatch,
            )
            for rule, table in zip(frame.rules, document.get("rules", []), strict=True)
        ),
        semantics=frame.semantics,
        seed=frame.seed,
        missing=frame.missing,
        mismatch=frame.mismatch,
        non_finite=frame.non_finite,
        compute_dtype=frame.compute_dtype,
        output=OutputSpec(
            dtype=None if frame.output.dtype == PROMOTED else frame.output.dtype,
            promotes=frame.output.dtype == PROMOTED,
            max_shard_bytes=frame.output.max_shard_size,
            companions={
                kind: origin if isinstance(origin, int) else Path(origin)
                for kind, origin in (frame.output.companions or {}).items()
            },
            quantization=frame.output.quantization,
            chat_template=frame.output.chat_template,
        ),
        vocabulary=frame.vocabulary,
        layers=tuple(
            _build_slice(shape, table, specs)
            for shape, table in zip(frame.layers, document.get("layers") or [], strict=True)
        ),
        mixture=frame.mixture,
    )


def _build_slice(
    shape: LayerSliceDocument,
    table: Mapping[str, Any],
    specs: Mapping[str, ParameterSpec],
) -> LayerSlice:
    """Return a slice of layers, the base first, then the sources in recipe order."""
    ranges = [
        LayerRange(
            each.source,
            each.layers[0],
            each.layers[1],
            {n: _varying(specs[n], v) for n, v in given.items() if n in specs},
        )
        for each, given in zip(shape.sources, table["sources"], strict=True)
    ]
    ranges.sort(key=lambda each: each.source)
    own = shape.base
    base = None if own is None else LayerRange(own.source, own.layers[0], own.layers[1])
    return LayerSlice(tuple(ranges), _values(table, specs), base)


def _values(table: Mapping[str, Any], specs: Mapping[str, ParameterSpec]) -> dict[str, Given]:
    return {
        name: tuple(_scalar(specs[name], item) for item in value)
        if isinstance(value, list)
        else _varying(specs[name], value)
        for name, value in table.items()
        if name in specs
    }


def _varying(spec: ParameterSpec, value: object) -> Varying:
    return build_varying(value, partial(_scalar, spec))


def _scalar(spec: ParameterSpec, value: Scalar) -> Scalar:
    return float(value) if spec.kind is ParameterKind.FLOAT else value
