"""The registry as text, for the command line and for the README's table."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from streammerge.methods.base import MergeMethod
from streammerge.recipe.types import ParameterKind, ParameterSpec


def list_methods(methods: Iterable[MergeMethod]) -> str:
    """Return one line per method."""
    rows = [(method.name, method.summary) for method in methods]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {summary}" for name, summary in rows)


def describe_method(method: MergeMethod) -> str:
    """Return what one method does, where it comes from, and its parameters."""
    lines = [
        f"{method.name}: {method.summary}",
        f"reference: {method.reference}",
        f"works on: {method.operand.value}",
        "parameters:",
    ]
    return "\n".join([*lines, *parameter_lines(method.parameters)])


def parameter_lines(parameters: Iterable[ParameterSpec]) -> list[str]:
    """Return two lines per parameter: what it takes, and what it means."""
    lines = []
    for spec in parameters:
        place = "per source" if spec.per_source else "shared"
        lines.append(f"  {spec.name} ({spec_range(spec)}; {place}; {spec_default(spec)})")
        lines.append(f"      {spec.doc}")
    return lines


def render_methods_table(methods: Iterable[MergeMethod]) -> str:
    """Return the README's table in Markdown."""
    lines = ["| method | what it does | parameters | reference |", "| --- | --- | --- | --- |"]
    for method in methods:
        names = ", ".join(f"`{spec.name}`" for spec in method.parameters)
        lines.append(f"| `{method.name}` | {method.summary} | {names} | {method.reference} |")
    return "\n".join(lines)


def method_as_json(method: MergeMethod) -> dict[str, Any]:
    """Return the same facts for scripts."""
    return {
        "name": method.name,
        "summary": method.summary,
        "reference": method.reference,
        "operand": method.operand.value,
        "parameters": [parameter_as_json(spec) for spec in method.parameters],
    }


def parameter_as_json(spec: ParameterSpec) -> dict[str, Any]:
    """Return everything that a parameter's specification says."""
    return {
        "name": spec.name,
        "kind": spec.kind.value,
        "doc": spec.doc,
        "default": spec.default,
        "required": spec.default is None,
        "per_source": spec.per_source,
        "per_tensor": spec.per_tensor,
        "minimum": spec.minimum,
        "maximum": spec.maximum,
        "choices": list(spec.choices),
    }


def spec_range(spec: ParameterSpec) -> str:
    """Return what values a parameter takes: ``"number in [0, 1]"``, ``"total | frequency"``."""
    if spec.kind is ParameterKind.CHOICE:
        return " | ".join(spec.choices)
    if spec.kind is ParameterKind.BOOL:
        return "true | false"
    number = "whole number" if spec.kind is ParameterKind.INT else "number"
    if spec.minimum is not None and spec.maximum is not None:
        return f"{number} in [{spec.minimum:g}, {spec.maximum:g}]"
    return number


def spec_default(spec: ParameterSpec) -> str:
    """Return ``"required"`` or ``"default 1.0"``."""
    if spec.default is None:
        return "required"
    value = str(spec.default).lower() if isinstance(spec.default, bool) else spec.default
    return f"default {value}"
