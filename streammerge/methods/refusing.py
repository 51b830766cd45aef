"""Reasons not to merge with some parameters, beyond the range of each; they begin with the key."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

from streammerge.methods.base import MergeMethod
from streammerge.recipe.types import ParameterValue


def refuse_sum(weights: Sequence[float], way_out: str, *, least: float = 0.0) -> str | None:
    """Return why weights cannot be divided by their sum, or None if they can.

    Args:
        weights: One per source.
        way_out: What else to set than weights.
        least: A sum that is no farther from 0 counts as 0. With 0, one that only rounds to 0 is
            the user's own number.
    """
    if abs(sum(weights)) > least:
        return None
    return (
        f"weight: the {len(weights)} weights {list(weights)} sum to 0, and are divided by their sum; "
        f"change them or set `{way_out}`"
    )


def refuse_unless_positive(key: str, value: float, why: str) -> str | None:
    """Return why a number must be above 0, or None if it is."""
    return None if value > 0 else f"{key}: expected a number above 0, got {value:g}; {why}"


def find_dividing(
    method: MergeMethod, settings: Sequence[Sequence[tuple[str, ParameterValue]]]
) -> list[str]:
    """Return the parameters whose values make tensors ask different things, of any setting."""

    def about(values: Mapping[str, ParameterValue]) -> list[Hashable]:
        return [each.about for each in method.work(method.bind(values.items())).rounds]

    first = dict(settings[0])
    return [
        name
        for name in first
        if any(about(first | {name: dict(values)[name]}) != about(first) for values in settings)
    ]
