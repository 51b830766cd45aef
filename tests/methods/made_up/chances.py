"""Methods that drop at random, by numbers that were found, or by each element's own probability."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from streammerge.methods.base import (
    DENSITY,
    SCOPE,
    WEIGHT,
    MergeMethod,
    Operand,
    Scope,
    Work,
    parameter,
)
from streammerge.methods.trimming import trim_round, trimmed
from streammerge.statistics.rounds import Answers, Round
from streammerge.tiles.writing import (
    Row,
    Sheet,
    Sink,
    keep_random,
    largest,
    total,
    weighted_sum,
)


@dataclass(frozen=True, slots=True)
class Params:
    """Parameters of all methods here."""

    weight: tuple[float, ...] = parameter(WEIGHT)
    """Factor per source."""
    density: tuple[float, ...] = parameter(DENSITY)
    """Fraction kept per source, in [0, 1]."""
    scope: str = parameter(SCOPE)
    """``tensor`` or ``model``."""


def by_size(params: Params) -> Work:
    """Return what is kept with a probability that grows with the magnitude."""

    def most(sheet: Sheet) -> Sequence[Sink]:
        return [largest(abs(v)) for v in sheet.task_vectors]

    def settle(answers: Answers) -> Sequence[float]:
        return [max(each, 1e-30) for each in answers.totals]

    def merge(sheet: Sheet) -> Row:
        rows = []
        for index, v in enumerate(sheet.task_vectors):
            probability = abs(v) / sheet.number(index) * params.density[index]
            rows.append(keep_random(v, index, probability))
        return sheet.base + weighted_sum(rows, params.weight)

    return Work(merge, (Round(most, settle=settle, about=("most",)),), Scope(params.scope))


def by_sparsity(params: Params) -> Work:
    """Return what is kept with the share of entries that are not zero."""

    def filled(sheet: Sheet) -> Sequence[Sink]:
        return [total(abs(v) > 0.0) for v in sheet.task_vectors]

    def settle(answers: Answers) -> Sequence[float]:
        # Beyond 1 too: as much as everything.
        return [2 * each / max(1, answers.numel) for each in answers.totals]

    def merge(sheet: Sheet) -> Row:
        rows = [
            keep_random(v, index, sheet.number(index)) for index, v in enumerate(sheet.task_vectors)
        ]
        return sheet.base + weighted_sum(rows, params.weight)

    return Work(merge, (Round(filled, settle=settle, about=("filled",)),), Scope(params.scope))


def trim_and_drop(params: Params) -> Work:
    """Return half of what trims keep, chosen at random."""

    def merge(sheet: Sheet) -> Row:
        rows = [keep_random(row, source, 0.5) for source, row in enumerate(trimmed(sheet))]
        return sheet.base + weighted_sum(rows, params.weight)

    return Work(merge, (trim_round(params.density, "exact"),), Scope(params.scope))


METHODS = tuple(
    MergeMethod(
        name=name,
        summary="Made up for tests.",
        reference="tests",
        params=Params,
        operand=Operand.TASK_VECTORS,
        work=work,
        random=True,
        examples=({"density": (0.5, 1.0)}, {"density": 0.75, "scope": "model"}),
    )
    for name, work in (
        ("by_size", by_size),
        ("by_sparsity", by_sparsity),
        ("trim_and_drop", trim_and_drop),
    )
)
