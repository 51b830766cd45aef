"""SCE: select the entries that vary most, calculate weights by energy, erase minority signs.

Source: Wan et al. 2024, FuseChat, arXiv:2408.07990. ``scope: model`` selects over the whole model, and
weighs each source by its energy there.
Semantics: ``mergekit`` selects nothing where nothing varies, so that one source with ``select_topk``
below 1 gives the base, and weighs alike where the mean squares sum to less than 1e-6, which those of
common fine-tunes do; ``paper`` selects everything there, and always weighs by energy.
Differs from mergekit: of equal variances the first are selected.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from streammerge.methods.base import SCOPE, Law, MergeMethod, Operand, Scope, Work, parameter
from streammerge.methods.families import LAMBDA, times
from streammerge.recipe.types import ParameterKind, ParameterSpec, Semantics
from streammerge.statistics.rounds import Answers, Found, Rank, Round
from streammerge.statistics.topk import TiePolicy, kept_count
from streammerge.tiles.writing import (
    Row,
    Sheet,
    Sink,
    dot,
    in_top,
    maximum,
    ranked,
    sign,
    total,
    weighted_sum,
)

_LEAST_DIVISOR = 1e-6

SELECT_TOPK = ParameterSpec(
    name="select_topk",
    kind=ParameterKind.FLOAT,
    doc="Fraction of the entries that vary which is selected, in [0, 1].",
    default=1.0,
    per_source=False,
    minimum=0.0,
    maximum=1.0,
)
UNIFORM_BELOW = ParameterSpec(
    name="uniform_below",
    kind=ParameterKind.FLOAT,
    doc="Where the mean squares of all sources sum to less, they weigh alike.",
    default=0.0,
    per_source=False,
    presets=((Semantics.MERGEKIT, 1e-6),),
)
SELECT_ALL_ALIKE = ParameterSpec(
    name="select_all_alike",
    kind=ParameterKind.BOOL,
    doc="Whether everything is selected, or nothing, where no entry varies.",
    default=True,
    per_source=False,
    presets=((Semantics.MERGEKIT, False),),
)


@dataclass(frozen=True, slots=True)
class SceParams:
    """Parameters of ``sce``."""

    select_topk: float = parameter(SELECT_TOPK)
    """Fraction selected of the entries that vary, in [0, 1]."""
    uniform_below: float = parameter(UNIFORM_BELOW)
    """Sum of mean squares below which sources weigh alike."""
    select_all_alike: bool = parameter(SELECT_ALL_ALIKE)
    """Whether everything is selected where nothing varies."""
    scope: str = parameter(SCOPE)
    """``tensor`` or ``model``."""
    lambda_: float = parameter(LAMBDA)
    """Factor of the whole change."""


def sce(params: SceParams) -> Work:
    """Return ``base + lambda sum_i w_i m_i s (x_i - base) / sum_i w_i m_i s``, s the selection."""
    selects = params.select_topk < 1
    first = int(selects)

    def chosen(sheet: Sheet) -> Sequence[Row]:
        if not selects:
            return sheet.task_vectors
        selected = in_top(_variance(sheet), 0)
        return [vector * selected for vector in sheet.task_vectors]

    def squares(sheet: Sheet) -> Sequence[Sink]:
        return [dot(row, row) for row in chosen(sheet)]

    def weigh(answers: Answers) -> Sequence[float]:
        return _energies(answers, params.uniform_below)

    def merge(sheet: Sheet) -> Row:
        rows = chosen(sheet)
        weights = [sheet.number(first + source) for source in range(len(rows))]
        votes = weighted_sum(rows, [1.0] * len(rows))
        elected = (votes >= 0.0) * 2.0 - 1.0
        agreeing = [maximum(row * elected, 0.0) for row in rows]
        shares = [sign(row) for row in agreeing]
        merged = weighted_sum(agreeing, weights) * elected
        merged = merged / maximum(weighted_sum(shares, weights), _LEAST_DIVISOR)
        return sheet.base + times(merged, params.lambda_)

    rounds = (Round(squares, settle=weigh, about=(params.uniform_below,)),)
    return Work(
        merge,
        (*(_selection(params) if selects else ()), *rounds),
        Scope(params.scope),
        kept=lambda _: (),
    )


def _variance(sheet: Sheet) -> Row:
    """Return how much each entry varies over the sources: its mean squared distance to their mean."""
    vectors = sheet.task_vectors
    mean = weighted_sum(vectors, [1.0] * len(vectors)) / float(len(vectors))
    distances = [vector - mean for vector in vectors]
    squares = [distance * distance for distance in distances]
    return weighted_sum(squares, [1.0] * len(vectors)) / float(len(vectors))


def _selection(params: SceParams) -> tuple[Round, Round]:
    """Return the rounds that count what varies, and find the rank that selects of it."""

    def varying(sheet: Sheet) -> Sequence[Sink]:
        return [total(_variance(sheet) > 0.0)]

    def values(sheet: Sheet) -> Sequence[Sink]:
        return [ranked(_variance(sheet))]

    def ranks(numel: int, before: Found) -> Sequence[Rank]:
        varies = int(before.numbers[0])
        everything = varies == 0 and params.select_all_alike
        k = numel if everything else kept_count(params.select_topk, varies)
        return [Rank(k, TiePolicy.EXACT)]

    about = (params.select_topk, params.select_all_alike)
    return Round(varying, about=about), Round(values, ranks, about=about)


def _energies(answers: Answers, uniform_below: float) -> Sequence[float]:
    """Return the weight of each source: its mean square, over the sum of all."""
    count = len(answers.totals)
    squares = [square / max(answers.numel, 1) for square in answers.totals]
    summed = sum(squares)
    if summed < uniform_below:
        return [1 / count] * count
    return [square / summed if summed else 0.0 for square in squares]


METHODS = (
    MergeMethod(
        name="sce",
        summary="Selects what varies most, weighs sources by energy, erases minority signs.",
        reference="Wan et al. 2024, arXiv:2408.07990",
        params=SceParams,
        operand=Operand.TASK_VECTORS,
        work=sce,
        semantics=(Semantics.PAPER, Semantics.MERGEKIT),
        examples=(
            {},
            {"select_topk": 0.3},
            {"select_topk": 0.5, "uniform_below": 1.0, "lambda": 0.5},
            {"select_topk": 0.0},
            {"select_topk": 0.4, "scope": "model"},
        ),
        waived={
            Law.NEGATION: "an exactly balanced vote elects + whatever the signs",
            Law.SCALING: "`uniform_below` does not grow with the task vectors",
            Law.ORDER: "variances are rounded otherwise, and others may be selected",
        },
    ),
)
