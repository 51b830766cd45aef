"""The registry as text, for the command line and for the documentation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from streammerge.methods.base import Locality, MergeMethod, Operand, Work
from streammerge.recipe.types import ParameterKind, ParameterSpec, Scalar, Semantics
from streammerge.tiles.program import Op
from streammerge.tiles.writing import Sheet


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
        f"semantics: {describe_semantics(method)}",
        f"works on: {method.operand.value}",
        f"locality: {locality_of(method)}",
        f"least memory: {least_memory_of(method)}",
        f"sources: {describe_count(method)}",
        f"rounds: {describe_rounds(method)}",
        f"scope: {' or '.join(scopes_of(method))}",
        "parameters:" if method.parameters else "parameters: none",
    ]
    return "\n".join([*lines, *parameter_lines(method.parameters, method.semantics)])


def describe_semantics(method: MergeMethod) -> str:
    """Return whose definitions there are: ``"peft (default), mergekit, paper"``."""
    first, *others = (each.value for each in method.semantics)
    return ", ".join([f"{first} (default)", *others]) if others else first


def describe_count(method: MergeMethod) -> str:
    """Return how many sources a method merges: ``"two or more"``, ``"exactly one"``."""
    words = {1: "one", 2: "two"}
    least, most = (words.get(count or 0, str(count)) for count in method.sources)
    if method.sources[1] is None:
        return f"{least} or more"
    return f"exactly {least}" if least == most else f"{least} to {most}"


_LOCALITIES = {
    Locality.ELEMENT: "element by element",
    Locality.ROW: "whole rows",
    Locality.TENSOR: "whole tensors",
}
_LEAST_MEMORY = {
    Locality.ELEMENT: "a block of 262,144 elements per model",
    Locality.ROW: "a block, or the widest row, per model",
    Locality.TENSOR: "the largest tensor, about 130 bytes per element and those of the sources",
}


def localities_of(method: MergeMethod) -> list[Locality]:
    """Return what entries of a result depend on, beside what rounds find; by its examples."""
    found = [_work_of(method, example)[0].locality for example in method.examples]
    return list(dict.fromkeys(found))


def locality_of(method: MergeMethod) -> str:
    """Return the same in words: ``"element by element; with other parameters whole rows"``."""
    first, *others = (_LOCALITIES[each] for each in localities_of(method))
    return f"{first}; with other parameters {' or '.join(others)}" if others else first


def least_memory_of(method: MergeMethod) -> str:
    """Return what the least budget depends on, beside the number of models."""
    first, *others = (_LEAST_MEMORY[each] for each in localities_of(method))
    return f"{first}; with other parameters {' or '.join(others)}" if others else first


def scopes_of(method: MergeMethod) -> tuple[str, ...]:
    """Return what its rounds may cover, the default first: ``"tensor"``, ``"model"``."""
    given = (spec.choices for spec in method.parameters if spec.name == "scope")
    return next(given, ("tensor",))


def describe_rounds(method: MergeMethod) -> str:
    """Return how often it looks before it merges, and for what, for its first example.

    Example: ``"1 before the merge (ranks); up to 3 with other parameters"``.
    """
    found, *others = [rounds_of(method, example) for example in method.examples]
    text = f"{len(found)} before the merge ({'; '.join(found)})" if found else "none"
    most = max((len(each) for each in others), default=0)
    return f"{text}; up to {most} with other parameters" if most > len(found) else text


_FINDS = {
    Op.RANK: "ranks",
    Op.SUM: "sums",
    Op.DOT: "inner products",
    Op.LARGEST: "largest values",
}


def _work_of(method: MergeMethod, example: Mapping[str, Any]) -> tuple[Work, int]:
    """Return what a method does with some parameters, as a recipe spells them, and for how many."""
    given = [len(value) for value in example.values() if isinstance(value, tuple)]
    count = given[0] if given else method.sources[1] or max(2, method.sources[0])
    values = []
    for spec in method.parameters:
        value = example.get(spec.name, spec.default_of(method.semantics[0]))
        spread = spec.per_source and not isinstance(value, tuple)
        values.append((spec.name, (value,) * count if spread else value))
    return method.work(method.bind(values)), count


def rounds_of(method: MergeMethod, example: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what each round finds with some parameters, as a recipe spells them."""
    work, count = _work_of(method, example)
    has_base = method.operand is not Operand.WEIGHTS
    asked = [each.sinks(Sheet(count, has_base)) for each in work.rounds]
    return tuple(", ".join(dict.fromkeys(_FINDS[sink.op] for sink in sinks)) for sinks in asked)


def parameter_lines(
    parameters: Iterable[ParameterSpec], semantics: Sequence[Semantics] = ()
) -> list[str]:
    """Return two lines per parameter: what it takes, and what it means.

    Args:
        parameters: The parameters.
        semantics: Whose definitions there are, the default first; their presets are said.
    """
    lines = []
    for spec in parameters:
        place = "per source" if spec.per_source else "shared"
        default = spec_default(spec, semantics)
        lines.append(f"  {spec.name} ({spec_range(spec)}; {place}; {default})")
        lines.append(f"      {spec.doc}")
    return lines


def render_methods_table(methods: Iterable[MergeMethod]) -> str:
    """Return the documentation's table in Markdown."""
    heads = ("method", "what it does", "sources", "semantics", "sweeps", "parameters", "reference")
    rows: list[tuple[str, ...]] = [heads, ("---",) * len(heads)]
    for method in methods:
        sweeps = {1 + len(rounds_of(method, example)) for example in method.examples}
        rows.append(
            (
                f"`{method.name}`",
                method.summary,
                describe_count(method),
                ", ".join(f"`{each.value}`" for each in method.semantics),
                " to ".join(map(str, sorted({min(sweeps), max(sweeps)}))),
                ", ".join(f"`{spec.name}`" for spec in method.parameters),
                method.reference,
            )
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def method_as_json(method: MergeMethod) -> dict[str, Any]:
    """Return the same facts for scripts."""
    return {
        "name": method.name,
        "summary": method.summary,
        "reference": method.reference,
        "operand": method.operand.value,
        "locality": locality_of(method),
        "least_memory": least_memory_of(method),
        "semantics": [each.value for each in method.semantics],
        "sources": {"least": method.sources[0], "most": method.sources[1]},
        "rounds": list(rounds_of(method, method.examples[0])),
        "scopes": list(scopes_of(method)),
        "parameters": [parameter_as_json(spec, method.semantics) for spec in method.parameters],
    }


def parameter_as_json(spec: ParameterSpec, semantics: Sequence[Semantics] = ()) -> dict[str, Any]:
    """Return everything that a parameter's specification says, with the default of each semantics."""
    return {
        "name": spec.name,
        "kind": spec.kind.value,
        "doc": spec.doc,
        "default": _first_default(spec, semantics),
        "defaults": {each.value: spec.default_of(each) for each in semantics},
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
    return number if spec.minimum is None else f"{number}, at least {spec.minimum:g}"


def spec_default(spec: ParameterSpec, semantics: Sequence[Semantics] = ()) -> str:
    """Return ``"required"``, ``"default 1.0"`` or ``"default count, weights under mergekit"``."""
    default = _first_default(spec, semantics)
    if default is None:
        return "required"
    others = [
        f", {_spelled(value)} under {each.value}"
        for each in semantics[1:]
        if (value := spec.default_of(each)) != default
    ]
    return "".join([f"default {_spelled(default)}", *others])


def _first_default(spec: ParameterSpec, semantics: Sequence[Semantics]) -> Scalar | None:
    return spec.default_of(semantics[0]) if semantics else spec.default


def _spelled(value: Scalar | None) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
