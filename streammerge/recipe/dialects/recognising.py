"""Whose recipe a document is, told before anything that reads it is imported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_MARKERS = frozenset({"merge_method", "models", "slices", "modules", "base_model"})
"""Top-level keys that only a recipe for mergekit has."""


def is_mergekit(document: Mapping[Any, Any]) -> bool:
    """Return whether a document is a recipe for mergekit, and none of this tool."""
    return (
        is_mixture(document)
        or "merge_method" in document
        or ("method" not in document and not _MARKERS.isdisjoint(document))
    )


def is_mixture(document: Mapping[Any, Any]) -> bool:
    """Return whether a document is a recipe for mergekit-moe."""
    return "experts" in document and "method" not in document and "merge_method" not in document
