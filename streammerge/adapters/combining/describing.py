"""The combination types as text, beside the methods that merge models."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from streammerge.adapters.combining.combinations import COMBINATIONS, Combination
from streammerge.methods.describing import parameter_as_json, parameter_lines


def list_combinations() -> str:
    """Return one line per combination type, under a heading."""
    width = max(len(name) for name in COMBINATIONS)
    rows = [f"{name:<{width}}  {each.summary}" for name, each in COMBINATIONS.items()]
    return "\n".join(["for adapters, without a base:", *rows])


def describe_combination(combination: Combination) -> str:
    """Return what one type does to adapters, where it comes from, and its parameters."""
    lines = [
        f"{combination.name}, for adapters without a base: {combination.summary}",
        f"reference: {combination.reference}",
        f"works on: {combination.target.value}",
        "parameters:",
        *parameter_lines(combination.parameters),
    ]
    return "\n".join(lines)


def combinations_as_json(combinations: Iterable[Combination]) -> list[dict[str, Any]]:
    """Return the same facts for scripts."""
    return [
        {
            "name": each.name,
            "summary": each.summary,
            "reference": each.reference,
            "operand": f"adapters: {each.target.value}",
            "parameters": [parameter_as_json(spec) for spec in each.parameters],
        }
        for each in combinations
    ]
