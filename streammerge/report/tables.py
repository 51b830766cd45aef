"""Tables of measures: by tensor, by layer, by kind of module, by both, and one row about the model.

A table is a dictionary of columns, each as long as the others, which is what data frames are made of.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from streammerge.report.naming import natural, place_of
from streammerge.report.sums import MEASURES, Floats, Sums
from streammerge.statistics.surveying import SurveyLayout

Cell = float | int | str | None
"""A value of a table; None where there is none."""
Table = dict[str, list[Cell]]
"""Columns by name."""
TABLES = ("tensors", "layers", "modules", "cells", "model")
"""The names of the tables; that by layer and kind of module is called ``cells``."""
_WHOLE_NUMBERS = ("largest_at",)


@dataclass(frozen=True, slots=True)
class SurveyedTensor:
    """What is known of one tensor."""

    name: str
    """Its name."""
    numel: int
    """Its elements."""
    layout: SurveyLayout
    """Which numbers are known of it."""
    row: Floats
    """They."""
    sources: tuple[int, ...]
    """Which of all sources each of its own is."""
    kept: tuple[int, ...] = ()
    """Entries that the method keeps of each; empty where it does not choose."""
    thresholds: tuple[float | None, ...] = ()
    """Smallest magnitude that is kept of each; empty where that is not one per source."""


def build_tables(tensors: Sequence[SurveyedTensor], sources: int) -> dict[str, Table]:
    """Return all tables about some tensors.

    Args:
        tensors: The tensors, in any order.
        sources: How many sources there are.
    """
    tensors = sorted(tensors, key=lambda each: natural(each.name))
    sums = Sums.empty(len(tensors), sources)
    for each in tensors:
        sums.add(each.numel, each.layout, each.row, each.sources, each.kept)
    places = [place_of(each.name) for each in tensors]
    names = [each.name for each in tensors]
    own: Table = {
        "name": list(names),
        "layer": [layer for layer, _ in places],
        "module": [module for _, module in places],
        "numel": [each.numel for each in tensors],
    }
    for source in range(sources):
        own[f"threshold.{source}"] = [_threshold_of(each, source) for each in tensors]
    tables = {"tensors": _without_empty(own | _measured(sums))}
    for title, keys in (
        ("layers", [(layer,) for layer, _ in places]),
        ("modules", [(module,) for _, module in places]),
        ("cells", places),
        ("model", [()] * len(places)),
    ):
        heads = {"layers": ("layer",), "modules": ("module",), "cells": ("layer", "module")}
        tables[title] = _grouped(sums, keys, heads.get(title, ()), names)
    return tables


def _threshold_of(tensor: SurveyedTensor, source: int) -> float | None:
    if source not in tensor.sources or len(tensor.thresholds) != len(tensor.sources):
        return None
    return tensor.thresholds[tensor.sources.index(source)]


def _measured(sums: Sums) -> Table:
    return {name: _as_cells(name, column) for name, column in sums.measures()}


def _as_cells(name: str, column: Floats) -> list[Cell]:
    # JSON has no NaN.
    if name.partition(".")[0] in _WHOLE_NUMBERS:
        return [None if math.isnan(value) else int(value) for value in column.tolist()]
    return [value if math.isfinite(value) else None for value in column.tolist()]


def _grouped(
    sums: Sums,
    keys: Sequence[tuple[str, ...]],
    heads: Sequence[str],
    names: Sequence[str],
) -> Table:
    """Return the table of groups of tensors that share a key."""
    ordered = sorted(set(keys), key=lambda key: tuple(map(natural, key)))
    numbers = {key: index for index, key in enumerate(ordered)}
    groups = np.array([numbers[key] for key in keys], dtype=np.int64)
    found, owners = sums.grouped(groups, len(ordered))
    counts = np.bincount(groups, minlength=len(ordered))
    table: Table = {head: [key[at] for key in ordered] for at, head in enumerate(heads)}
    table["tensors"] = [int(count) for count in counts]
    table["numel"] = [int(count) for count in found.rows[:, found.columns.of_all("numel")]]
    table |= _measured(found)
    for source in range(found.columns.sources):
        table[f"largest_in.{source}"] = [
            None if owner < 0 else names[owner] for owner in owners[:, source].tolist()
        ]
    return _without_empty(table)


def _without_empty(table: Table) -> Table:
    """Return a table without the columns in which nothing stands."""
    return {
        name: column for name, column in table.items() if any(cell is not None for cell in column)
    }


def describe_measures(tables: Mapping[str, Table]) -> dict[str, str]:
    """Return what the columns that are there mean, by their names without numbers."""
    used = {name.partition(".")[0] for table in tables.values() for name in table}
    return {name: text for name, text in MEASURES.items() if name in used}
