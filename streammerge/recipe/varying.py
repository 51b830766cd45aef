"""Values that differ from tensor to tensor: gradients over the layers, and cases by name.

    t: {gradient: [0, 0.5, 1]}
    t: {cases: [{tensors: "*.mlp.*", value: 0.3}, {value: {gradient: [0, 1]}}]}

A bare list is never one of these: it has one value per source.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from typing import TypeGuard

from streammerge.recipe.refusing import key_path, shown, unknown_key
from streammerge.recipe.types import (
    Case,
    Cases,
    Gradient,
    ParameterKind,
    ParameterSpec,
    Scalar,
    Varying,
)

GRADIENT, CASES = "gradient", "cases"
"""The keys that such a value is written with."""
_OF_A_CASE = ("tensors", "value")


def is_varying(value: object) -> TypeGuard[dict[object, object]]:
    """Return whether what stands in a document is meant as a gradient or as cases."""
    return isinstance(value, dict) and not {GRADIENT, CASES}.isdisjoint(value)


def value_at(value: Varying, name: str, depth: float) -> Scalar | None:
    """Return the value for one tensor; None where no case is about it.

    Args:
        value: What the recipe says.
        name: The tensor's name.
        depth: Where its layer is: 0 for the first, 1 for the last.
    """
    if isinstance(value, Gradient):
        return _interpolated(value, depth)
    if isinstance(value, Cases):
        for case in value.cases:
            if case.tensors is None or fnmatchcase(name, case.tensors):
                return value_at(case.value, name, depth)
        return None
    return value


def _interpolated(gradient: Gradient, depth: float) -> Scalar:
    """Return the value at a depth, linear between the values given; words and switches do not blend."""
    values = gradient.values
    position = depth * (len(values) - 1)
    below = min(int(position), len(values) - 1)
    low, high = values[below], values[min(below + 1, len(values) - 1)]
    if isinstance(low, bool | str) or isinstance(high, bool | str):
        return low
    share = position - below
    return low + (high - low) * share if share else low


def iter_varying_problems(
    path: str,
    spec: ParameterSpec,
    value: dict[object, object],
    refuse: Callable[[object], str | None],
) -> Iterator[str]:
    """Yield what is wrong with a gradient or cases, a line for each problem.

    Args:
        path: The path of the key.
        spec: The parameter.
        value: What stands there.
        refuse: Tells what is wrong with a single value.
    """
    if not spec.per_tensor:
        yield f"{path}: one value serves the whole model, got a mapping; give a single value"
        return
    for key in value:
        if key not in (GRADIENT, CASES):
            yield f"{path}.{shown(key)}: {unknown_key(key, (GRADIENT, CASES))}"
    if len(value) != 1:
        yield f"{path}: expected either gradient or cases, got {len(value)} keys"
    elif GRADIENT in value:
        yield from _gradient_problems(f"{path}.{GRADIENT}", spec, value[GRADIENT], refuse)
    elif CASES in value:
        yield from _cases_problems(f"{path}.{CASES}", spec, value[CASES], refuse)


def _gradient_problems(
    path: str, spec: ParameterSpec, values: object, refuse: Callable[[object], str | None]
) -> Iterator[str]:
    if spec.kind is ParameterKind.INT:
        yield f"{path}: {spec.name} is a whole number, which has nothing between; use cases"
    if not isinstance(values, list) or not values:
        yield f"{path}: expected a list of values from the first layer to the last, got {shown(values)}"
        return
    for index, item in enumerate(values):
        if (said := refuse(item)) is not None:
            yield f"{path}[{index}]: {said}"


def _cases_problems(
    path: str, spec: ParameterSpec, cases: object, refuse: Callable[[object], str | None]
) -> Iterator[str]:
    if not isinstance(cases, list) or not cases:
        yield f"{path}: expected a list of {{tensors, value}}, got {shown(cases)}"
        return
    for index, case in enumerate(cases):
        here = f"{path}[{index}]"
        if not isinstance(case, dict):
            yield f"{here}: expected a mapping with value and perhaps tensors, got {shown(case)}"
            continue
        for key in case:
            if key not in _OF_A_CASE:
                yield f"{here}.{key_path(key)}: {unknown_key(key, _OF_A_CASE)}"
        glob = case.get("tensors")
        if glob is not None and (not isinstance(glob, str) or not glob):
            yield f"{here}.tensors: expected a glob on tensor names, got {shown(glob)}"
        if glob is None and index + 1 < len(cases):
            yield f"{here}: a case without tensors is about all, and the ones after it about none"
        yield from _case_value_problems(f"{here}.value", spec, case, refuse)


def _case_value_problems(
    path: str,
    spec: ParameterSpec,
    case: dict[object, object],
    refuse: Callable[[object], str | None],
) -> Iterator[str]:
    value = case.get("value")
    if "value" not in case:
        yield f"{path}: this key is required"
    elif isinstance(value, dict):
        if set(value) != {GRADIENT}:
            yield f"{path}: expected a value or a gradient, got a mapping of other keys"
        else:
            yield from _gradient_problems(f"{path}.{GRADIENT}", spec, value[GRADIENT], refuse)
    elif (said := refuse(value)) is not None:
        yield f"{path}: {said}"


def build_varying(value: object, scalar: Callable[[Scalar], Scalar]) -> Varying:
    """Return the value that a document, which was found to be right, holds.

    Args:
        value: What stands there.
        scalar: Makes a value of the parameter's type.
    """
    if not isinstance(value, dict):
        return scalar(value)  # type: ignore[arg-type]
    if GRADIENT in value:
        return Gradient(tuple(scalar(each) for each in value[GRADIENT]))
    return Cases(
        tuple(
            Case(case.get("tensors"), build_varying(case["value"], scalar))  # type: ignore[arg-type]
            for case in value[CASES]
        )
    )


def plain_varying(value: Varying) -> object:
    """Return a value as YAML has it."""
    if isinstance(value, Gradient):
        return {GRADIENT: list(value.values)}
    if isinstance(value, Cases):
        return {CASES: [_plain_case(case) for case in value.cases]}
    return value


def _plain_case(case: Case) -> dict[str, object]:
    names = {} if case.tensors is None else {"tensors": case.tensors}
    return names | {"value": plain_varying(case.value)}
