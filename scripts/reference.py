"""Reference pages that are made from the code: commands, keys of the recipe, methods, events, manifest.

Each function returns the text of one generated part; ``scripts/update_docs.py`` puts it in its place.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from streammerge.adapters.combining.combinations import COMBINATIONS
from streammerge.adapters.combining.describing import describe_combination
from streammerge.cli.arguments import build_parser
from streammerge.methods.base import MergeMethod
from streammerge.methods.describing import (
    describe_count,
    describe_rounds,
    describe_semantics,
    least_memory_of,
    locality_of,
    spec_default,
    spec_range,
)
from streammerge.recipe.types import ParameterSpec

_ROOT = Path(__file__).resolve().parent.parent


def render_commands() -> str:
    """Return a section for each command: what it does, its arguments, its example."""
    (added,) = (
        action
        for action in build_parser()._actions  # noqa: SLF001 - argparse has no other way
        if isinstance(action, argparse._SubParsersAction)  # noqa: SLF001
    )
    return "\n\n".join(_command(name, parser) for name, parser in added.choices.items())


def _command(name: str, parser: argparse.ArgumentParser) -> str:
    actions = [each for each in parser._actions if each.dest != "help"]  # noqa: SLF001
    usage = (parser.usage or _usage(name, actions)).replace("       streammerge", "streammerge")
    example = (parser.epilog or "").split("\n")[-1].strip()
    rows = [(_cell(f"`{_spelled(each)}`"), _cell(each.help or "")) for each in actions]
    return "\n".join(
        [
            f"## {name}",
            "",
            parser.description or "",
            "",
            f"```text\n{usage}\n```",
            "",
            *_table(("argument", "meaning"), rows),
            "",
            f"For example `{example}`.",
        ]
    )


def _usage(name: str, actions: Iterable[argparse.Action]) -> str:
    """Return how a command is called, without its options."""
    words = [f"streammerge {name}"]
    for action in actions:
        if not action.option_strings:
            word = _spelled(action)
            words.append({"+": f"{word}...", "?": f"[{word}]"}.get(str(action.nargs), word))
    return " ".join([*words, "[options]"])


def _spelled(action: argparse.Action) -> str:
    of = action.metavar or ("|".join(map(str, action.choices)) if action.choices else "")
    value = " ".join(of) if isinstance(of, tuple) else of
    takes = action.nargs != 0 and value
    return f"{', '.join(action.option_strings)} {value if takes else ''}".strip()


def render_recipe_keys(schema: Mapping[str, Any]) -> str:
    """Return a table of every key of the recipe but parameters, with types and defaults."""
    documents = schema["$defs"]
    shared = {"weight", "density"}
    of_source = {
        key: value
        for key, value in documents["linear.source"]["properties"].items()
        if key not in shared
    }
    of_rule = {
        key: value
        for key, value in documents["linear.rule"]["properties"].items()
        if key not in shared
    }
    groups = {
        "": schema["properties"],
        "base.": documents["BaseDocument"]["properties"],
        "sources[].": of_source,
        "sources[].rename[].": documents["RenameDocument"]["properties"],
        "rules[].": of_rule,
        "layers[].": {
            key: value
            for key, value in documents["linear.slice"]["properties"].items()
            if "description" in value
        },
        "output.": documents["OutputDocument"]["properties"],
    }
    rows = [
        (f"`{prefix}{key}`", _kind(value, documents), _default(value), _cell(_told(value)))
        for prefix, keys in groups.items()
        for key, value in keys.items()
    ]
    return "\n".join(_table(("key", "values", "default", "meaning"), rows))


def _told(value: Mapping[str, Any]) -> str:
    return str(value.get("description", ""))


def _kind(value: Mapping[str, Any], documents: Mapping[str, Any]) -> str:
    """Return what a key may be, in a few words."""
    if "$ref" in value:
        return _kind(documents[value["$ref"].rsplit("/", 1)[1]], documents)
    if "enum" in value:
        return ", ".join(f"`{each}`" for each in value["enum"] if each is not None)
    if "const" in value:
        return f"`{value['const']}`"
    for several in ("anyOf", "oneOf"):
        if several in value:
            kinds = [
                _kind(each, documents) for each in value[several] if each.get("type") != "null"
            ]
            return ", ".join(dict.fromkeys(kind for kind in kinds if kind))
    names = {"string": "text", "object": "keys", "array": "list", "boolean": "`true`, `false`"}
    kind = str(value.get("type", ""))
    if kind in {"integer", "number"}:
        least, most = value.get("minimum"), value.get("maximum")
        span = "" if least is None else f" from {least}" + ("" if most is None else f" to {most}")
        return ("whole number" if kind == "integer" else "number") + span
    return names.get(kind, kind)


def _default(value: Mapping[str, Any]) -> str:
    default = value.get("default")
    return "" if default is None else f"`{json.dumps(default)}`".replace('"', "")


def render_methods(methods: Iterable[MergeMethod]) -> str:
    """Return a section for each method, with its parameters; then one for each way to combine adapters."""
    parts = [_method(method) for method in methods]
    combined = "\n\n".join(
        f"### {name} (adapters without a base)\n\n```text\n{describe_combination(each)}\n```"
        for name, each in sorted(COMBINATIONS.items())
    )
    return "\n\n".join([*parts, combined])


def _method(method: MergeMethod) -> str:
    facts = {
        "reference": method.reference,
        "semantics": describe_semantics(method),
        "works on": method.operand.value,
        "sources": describe_count(method),
        "locality": f"{locality_of(method)}; least memory: {least_memory_of(method)}",
        "rounds": describe_rounds(method),
    }
    lines = [f"### {method.name}", "", method.summary, ""]
    lines += [f"- *{name}*: {fact}" for name, fact in facts.items()]
    if method.parameters:
        rows = [_parameter(spec, method) for spec in method.parameters]
        lines += ["", *_table(("parameter", "values", "default", "meaning"), rows)]
    return "\n".join(lines)


def _parameter(spec: ParameterSpec, method: MergeMethod) -> tuple[str, ...]:
    per = ", per source" if spec.per_source else ""
    default = _cell(spec_default(spec, method.semantics).removeprefix("default "))
    return f"`{spec.name}`", _cell(spec_range(spec)) + per, default, _cell(spec.doc)


def render_events(schema: Mapping[str, Any]) -> str:
    """Return a section for each kind of event."""
    parts = []
    for kind, event in schema["$defs"].items():
        rows = [
            (f"`{key}`", _json_kind(value), _cell(_told(value)))
            for key, value in event["properties"].items()
            if key != "event"
        ]
        table = "\n".join(_table(("key", "type", "meaning"), rows))
        parts.append(f"## {kind}\n\n{event['description']}\n\n{table}")
    return "\n\n".join(parts)


def _json_kind(value: Mapping[str, Any]) -> str:
    kinds = value.get("type", "text")
    return " or ".join([kinds] if isinstance(kinds, str) else kinds)


def render_fields(places: Sequence[tuple[str, str, str]]) -> str:
    """Return a table of the fields of each of some classes.

    Args:
        places: The heading, the module's path below the package, and the class.
    """
    parts = []
    for heading, module, name in places:
        rows = [
            (f"`{field}`", _cell(f"`{kind}`"), _cell(told))
            for field, kind, told in _fields(module, name)
        ]
        parts.append(f"## {heading}\n\n" + "\n".join(_table(("key", "type", "meaning"), rows)))
    return "\n\n".join(parts)


def _fields(module: str, name: str) -> Iterator[tuple[str, str, str]]:
    """Yield name, type and docstring of the fields of a class, from its source."""
    tree = ast.parse((_ROOT / "streammerge" / module).read_text(encoding="utf-8"))
    (found,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    for field, told in zip(found.body, found.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            text = ast.literal_eval(told.value) if isinstance(told, ast.Expr) else ""
            named = re.sub(r":\w+:`~?([\w.]+)`", r"``\1``", text)
            yield field.target.id, ast.unparse(field.annotation), named


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _cell(text: str) -> str:
    """Return a text as it may stand in a cell of a table."""
    return re.sub(r"\s+", " ", text).replace("|", "\\|").replace("``", "`")
