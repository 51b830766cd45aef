"""Values of mergekit's parameters: numbers in quotes, gradients, values that depend on names."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from streammerge.recipe.dialects.methods import Key, Leaf
from streammerge.recipe.refusing import shown
from streammerge.recipe.types import ParameterKind, ParameterSpec
from streammerge.recipe.varying import CASES, GRADIENT

_EVERYTHING = "*"
"""A filter that all names pass."""


def translate_value(
    value: object, key: Key, spec: ParameterSpec, remark: Callable[[str], None]
) -> Any:
    """Return a value as a recipe of this tool spells it.

    Args:
        value: A scalar; a list, which runs over the layers; or one or several ``{filter, value}``.
        key: The parameter.
        spec: What it is here.
        remark: Told what has no effect.

    Raises:
        ValueError: It is none of these; the message says what was expected.
    """
    if isinstance(value, dict):
        return _cases([value], key, spec, remark)
    if isinstance(value, list) and any(isinstance(each, dict) for each in value):
        return _cases(value, key, spec, remark)
    return _one(value, key, spec)


def with_default(value: Any, default: Leaf) -> Any:
    """Return a value, and the default where it says nothing."""
    if value is None:
        return default
    if isinstance(value, dict) and CASES in value and "tensors" in value[CASES][-1]:
        return {CASES: [*value[CASES], {"value": default}]}
    return value


def chained(*levels: Any) -> Any:
    """Return one value that says what several say, the nearest first; None if none says anything."""
    cases: list[dict[str, Any]] = []
    for value in levels:
        if value is None:
            continue
        some = value[CASES] if isinstance(value, dict) and CASES in value else [{"value": value}]
        cases += some
        if "tensors" not in some[-1]:
            break
    if not cases:
        return None
    return {CASES: cases} if "tensors" in cases[0] else cases[0]["value"]


def is_for_all(value: Any) -> bool:
    """Return whether a value says something about every tensor."""
    if isinstance(value, dict) and CASES in value:
        return "tensors" not in value[CASES][-1]
    return value is not None


def literally(text: str) -> str:
    """Return a glob for a text as it stands."""
    return re.sub(r"([*?[])", r"[\1]", text)


def _cases(
    cases: list[Any], key: Key, spec: ParameterSpec, remark: Callable[[str], None]
) -> dict[str, Any]:
    made: list[dict[str, Any]] = []
    for index, case in enumerate(cases):
        if (
            not isinstance(case, dict)
            or "value" not in case
            or not set(case) <= {"filter", "value"}
        ):
            raise ValueError(
                f"expected {{filter, value}} as entry {index} of the list, got {_told(case)}"
            )
        if made and "tensors" not in made[-1]:
            remark(f"no effect from entry {index} on: the one before is for all tensors")
            break
        given = case.get("filter")
        if given is not None and not isinstance(given, str):
            raise ValueError(f"expected text as the filter of entry {index}, got {shown(given)}")
        value = _one(case["value"], key, spec)
        everything = given is None or given == _EVERYTHING
        made.append({"value": value} if everything else {"tensors": _glob(given), "value": value})
    return {CASES: made}


def _told(case: object) -> str:
    return f"a mapping with {', '.join(map(str, case))}" if isinstance(case, dict) else shown(case)


def _glob(text: str | None) -> str:
    """Return a glob for names in which a text occurs."""
    return f"*{literally(text or '')}*"


def _one(value: object, key: Key, spec: ParameterSpec) -> Any:
    """Return a scalar, or a gradient."""
    if not isinstance(value, list):
        return _leaf(value, key, spec)
    if not value:
        raise ValueError("expected a value, got an empty list")
    return {GRADIENT: [_leaf(each, key, spec) for each in value]}


def _leaf(value: object, key: Key, spec: ParameterSpec) -> Leaf:
    """Return a single value; numbers may stand in quotes, and switches may be numbers."""
    if key.words or spec.kind is ParameterKind.BOOL:
        if not isinstance(value, bool) and value not in (0, 1):
            raise ValueError(f"expected true or false, got {shown(value)}")
        return key.words[bool(value)] if key.words else bool(value)
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise ValueError(f"expected a number, got {shown(value)}") from None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"expected a number, got {shown(value)}")  # noqa: TRY004 - of a document
    whole = spec.kind is ParameterKind.INT and isinstance(value, float) and value.is_integer()
    return int(value) if whole else value
