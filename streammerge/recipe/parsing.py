"""Recipe text to :class:`Recipe` and back.

Text becomes plain values, the keys that all methods share are checked by the models of ``schema``,
the rest against the parameters that the method declares. Everything found wrong is reported at
once. The text is trusted with nothing: its size, its nesting and what its aliases expand to are
bounded, and no value is guessed from one of another type.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from streammerge.errors import RecipeError, suggestion
from streammerge.recipe.resolving import Place, iter_parameter_problems, tables_of
from streammerge.recipe.schema import (
    MERGEKIT_KEYS,
    MERGEKIT_MARKERS,
    RecipeDocument,
    check_frame,
    key_path,
    mergekit_key,
    shown,
)
from streammerge.recipe.types import (
    BASE,
    CompanionKind,
    OutputSpec,
    ParameterKind,
    ParameterSpec,
    ParameterValue,
    Recipe,
    Rename,
    Rule,
    Scalar,
    Source,
)

MAX_TEXT_BYTES = 2**20
"""A recipe has tens of lines; a megabyte is a mistaken file, and slow to parse."""
MAX_NODES = 100_000
"""Values in a document with its aliases written out; nested aliases double it with every level."""
MAX_DEPTH = 64
"""Nesting; a recipe needs 4 levels, and the YAML parser recurses on each."""
MAX_DIGITS = 400
"""Digits of an integer; no key takes more than 20, and Python refuses to convert 4,300."""
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


def load_document(text: str, *, origin: str) -> object:
    """Return the plain values of a YAML or JSON text, as yet unchecked.

    Args:
        text: One YAML document.
        origin: What to call the text in messages: a file name.

    Raises:
        RecipeError: The text is not YAML.
    """
    try:
        return _load_yaml(text)
    except RecipeError as error:
        raise RecipeError(f"{origin}: {error}") from error.__cause__


def recipe_from_mapping(document: object, *, origin: str, methods: Methods) -> Recipe:
    """Return the recipe that ``document`` holds as plain dicts, lists, texts and numbers.

    Args:
        document: The keys and values that a YAML recipe would have.
        origin: What to call the document in messages.
        methods: Every known method's parameters.

    Raises:
        RecipeError: The document is not a recipe; one line for each problem.
    """
    try:
        return _translate(document, methods)
    except RecipeError as error:
        lines = str(error).split("\n")
        if len(lines) > MAX_PROBLEMS:
            lines[MAX_PROBLEMS:] = [f"and {len(lines) - MAX_PROBLEMS} more problems"]
        message = "\n".join(f"{origin}: {line}" for line in lines)
        raise RecipeError(message) from error.__cause__


def dump_recipe(recipe: Recipe) -> str:
    """Return ``recipe`` as YAML that parses back to an equal recipe; equal recipes, equal text."""
    document: dict[str, object] = {"method": recipe.method}
    if recipe.base is not None:
        document["base"] = str(recipe.base)
    document["sources"] = [
        {"path": str(source.path)}
        | ({} if source.component is None else {"component": source.component})
        | ({} if not source.rename else {"rename": list(map(_plain_rename, source.rename))})
        | _plain(source.parameters)
        for source in recipe.sources
    ]
    document["parameters"] = _plain(recipe.parameters)
    document["rules"] = [_plain_rule(rule) for rule in recipe.rules]
    if recipe.semantics is not None:
        document["semantics"] = recipe.semantics.value
    document["seed"] = recipe.seed
    document["missing"] = recipe.missing.value
    document["mismatch"] = recipe.mismatch.value
    document["non_finite"] = recipe.non_finite.value
    document["vocabulary"] = recipe.vocabulary.value
    document["compute_dtype"] = recipe.compute_dtype.value
    output: dict[str, object] = {}
    if recipe.output.max_shard_bytes is not None:
        output["max_shard_size"] = recipe.output.max_shard_bytes
    if recipe.output.dtype is not None:
        output["dtype"] = recipe.output.dtype.torch_name
    if recipe.output.companions:
        output["companions"] = {
            kind.value: _plain_origin(recipe.output.companions[kind])
            for kind in CompanionKind
            if kind in recipe.output.companions
        }
    if recipe.output.quantization is not None:
        output["quantization"] = recipe.output.quantization.value
    document["output"] = output
    # A folded line would be legal YAML; one value a line is what people compare.
    return yaml.dump(
        document, Dumper=_RecipeDumper, sort_keys=False, allow_unicode=True, width=sys.maxsize
    )


def _plain(parameters: Mapping[str, ParameterValue]) -> dict[str, object]:
    """Return ``parameters`` as YAML has them, sorted, so that equal recipes have equal text."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in sorted(parameters.items())
    }


def _plain_rename(rename: Rename) -> dict[str, str]:
    return {"from": rename.old, "to": rename.new}


def _plain_origin(origin: int | Path) -> object:
    if origin == BASE:
        return "base"
    return origin if isinstance(origin, int) else str(origin)


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


def _translate(document: object, methods: Methods) -> Recipe:
    """Return the recipe in ``document``; the lines of an error start at the key's path."""
    if document is None:
        raise RecipeError("the document is empty; a recipe needs at least method and sources")
    if not isinstance(document, dict):
        raise RecipeError(f"expected a mapping of keys to values, got {shown(document)}")
    if not MERGEKIT_MARKERS.isdisjoint(document):
        foreign = [key for key in document if key in MERGEKIT_KEYS]
        raise RecipeError("\n".join(f"{key}: {mergekit_key(key)}" for key in foreign))

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


def _frame(document: dict[Any, Any]) -> dict[object, object]:
    """Return ``document`` without what only the method can judge: its parameters."""
    frame = dict(document)
    if isinstance(frame.get("parameters"), dict):
        del frame["parameters"]
    for key, place in (("sources", Place.SOURCE), ("rules", Place.RULE)):
        if isinstance(frame.get(key), list):
            frame[key] = [
                {name: value for name, value in entry.items() if name in place.other_keys}
                if isinstance(entry, dict)
                else entry
                for entry in frame[key]
            ]
    return frame


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
    yield from _origin_problems(document, n_sources)
    if document.get("missing") == "base" and document.get("base") is None:
        yield 'missing: the recipe has no base to take tensors from; add the key "base"'


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


def _build(
    document: dict[Any, Any], frame: RecipeDocument, specs: Mapping[str, ParameterSpec]
) -> Recipe:
    """Return the recipe in a ``document`` that was found to be right."""
    return Recipe(
        method=frame.method,
        base=None if frame.base is None else Path(frame.base),
        sources=tuple(
            Source(
                path=Path(source["path"]),
                parameters={
                    name: _scalar(specs[name], source[name]) for name in source if name in specs
                },
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
            dtype=frame.output.dtype,
            max_shard_bytes=frame.output.max_shard_size,
            companions={
                kind: origin if isinstance(origin, int) else Path(origin)
                for kind, origin in (frame.output.companions or {}).items()
            },
            quantization=frame.output.quantization,
        ),
        vocabulary=frame.vocabulary,
    )


def _values(
    table: Mapping[str, Any], specs: Mapping[str, ParameterSpec]
) -> dict[str, ParameterValue]:
    return {
        name: tuple(_scalar(specs[name], item) for item in value)
        if isinstance(value, list)
        else _scalar(specs[name], value)
        for name, value in table.items()
        if name in specs
    }


def _scalar(spec: ParameterSpec, value: Scalar) -> Scalar:
    return float(value) if spec.kind is ParameterKind.FLOAT else value


def _load_yaml(text: str) -> object:
    """Return the plain values of one YAML document."""
    nbytes = len(text.encode("utf-8", "surrogatepass"))
    if nbytes > MAX_TEXT_BYTES:
        raise RecipeError(f"the text has {nbytes} bytes; a recipe may have {MAX_TEXT_BYTES}")
    try:
        loader = _RecipeLoader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        code = f"U+{ord(text[error.position]):04X}"
        raise RecipeError(f"line {line}: the character {code} cannot stand in YAML") from error
    except yaml.MarkedYAMLError as error:
        said = ", ".join(part for part in (error.context, error.problem) if part)
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise RecipeError(where + " ".join(said.split())) from error
    # PyYAML lets these through: an escape beyond Unicode, and a version number of 4,300 digits.
    except (ValueError, OverflowError) as error:
        line = loader.line + 1
        raise RecipeError(f"line {line}: a number in the text is too large: {error}") from error


class _RecipeLoader(yaml.SafeLoader):
    """YAML 1.2's core types only; duplicate keys, deep nesting and swelling aliases refused."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._n_nodes = 0
        self._node_sizes: dict[yaml.Node, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: int) -> Any:
        """Return the next value, counting it, or what its alias stands for."""
        is_alias = self.check_event(yaml.AliasEvent)
        mark = self.current_event.start_mark
        node: Any
        if is_alias:
            node = super().compose_node(parent, index)
            if node not in self._node_sizes:
                raise _yaml_error("an alias inside the value that it stands for", mark)
            self._n_nodes += self._node_sizes[node]
        else:
            self._depth += 1
            if self._depth > MAX_DEPTH:
                raise _yaml_error(f"nested deeper than {MAX_DEPTH} levels", mark)
            n_before = self._n_nodes
            node = super().compose_node(parent, index)
            self._n_nodes += 1
            self._node_sizes[node] = self._n_nodes - n_before
            self._depth -= 1
        if self._n_nodes > MAX_NODES:
            raise _yaml_error(f"more than {MAX_NODES} values once aliases are written out", mark)
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Return the mapping, no key of which appears twice."""
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        # Merge keys are resolved later, so an explicit key may override one that they bring.
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _yaml_error("expected text as a key", key.start_mark)
            if (key.tag, key.value) in lines:
                first = lines[key.tag, key.value]
                said = f"the key {shown(key.value)} appears twice, first on line {first}"
                raise _yaml_error(said, key.start_mark)
            lines[key.tag, key.value] = key.start_mark.line + 1
        return node

    def construct_text(self, node: yaml.ScalarNode) -> str:
        """Return a text, with the surrogate pairs of JSON's escapes joined into characters."""
        text = str(self.construct_scalar(node))
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")

    def construct_core(self, node: yaml.ScalarNode) -> int | float | bool | None:
        """Return the number, bool or null that a scalar of YAML's core types spells."""
        text = str(self.construct_scalar(node))
        kind = node.tag.rpartition(":")[2]
        if not _CORE_TYPES[kind].fullmatch(text):
            raise _yaml_error(f"expected {kind}, got {shown(text)}", node.start_mark)
        if kind == "null":
            return None
        if kind == "bool":
            return text.lower() == "true"
        if kind == "float":
            # float() reads inf and nan without YAML's dot.
            return float(re.sub(r"\.(?=[iInN])", "", text))
        if len(text) > MAX_DIGITS:
            raise _yaml_error(f"an integer of {len(text)} digits", node.start_mark)
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))


class _RecipeDumper(yaml.SafeDumper):
    """Quotes each text that YAML 1.1 or 1.2 would read as something else; writes no aliases."""

    def ignore_aliases(self, data: object) -> bool:
        """Return True: an alias would depend on which values happen to be one object."""
        del data
        return True

    def represent_text(self, text: str) -> yaml.Node:
        """Return the text's node, in double quotes where only an escape keeps it as it is.

        PyYAML writes line breaks like U+0085 as they are, and reads them back as spaces.
        """
        style = None if text.isprintable() else '"'
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


def _yaml_error(problem: str, mark: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


_CORE_TYPES = {
    "null": re.compile(r"~|null|Null|NULL|"),
    "bool": re.compile(r"true|True|TRUE|false|False|FALSE"),
    "int": re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"),
    "float": re.compile(
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
    ),
}
"""YAML 1.2.2, section 10.3.2: what an unquoted scalar must look like to be no text."""
_TAG = "tag:yaml.org,2002:"
# PyYAML's own are YAML 1.1: no and on are false and true, 1e-3 is text, 1:30 is 90, 012 is 10.
_RecipeLoader.yaml_implicit_resolvers = {}
_RecipeLoader.yaml_constructors = {
    **{_TAG + kind: _RecipeLoader.construct_core for kind in _CORE_TYPES},
    f"{_TAG}str": _RecipeLoader.construct_text,
    f"{_TAG}seq": _RecipeLoader.construct_yaml_seq,
    f"{_TAG}map": _RecipeLoader.construct_yaml_map,
    None: _RecipeLoader.construct_undefined,
}
_RecipeLoader.add_implicit_resolver(f"{_TAG}merge", re.compile(r"<<\Z"), ["<"])
for _kind, _spelling in _CORE_TYPES.items():
    for _yaml in (_RecipeLoader, _RecipeDumper):
        _whole = re.compile(rf"(?:{_spelling.pattern})\Z")
        _yaml.add_implicit_resolver(_TAG + _kind, _whole, None)
_RecipeDumper.add_representer(str, _RecipeDumper.represent_text)
