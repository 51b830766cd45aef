"""RAM and RAM+: per entry the mean over those task vectors that move it.

Source: Yuan et al. 2026, "Reinforced agent merging", arXiv:2601.13572; what only one source moves is
made larger in RAM+ by how much of what that source moves others move too.
Follows: mergekit 0.1.5 ``ram`` and ``ramplus_tl``, which count per tensor; ``scope: model`` counts
over the whole model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from streammerge.methods.base import SCOPE, Law, MergeMethod, Operand, Scope, Work, parameter
from streammerge.methods.refusing import refuse_unless_positive
from streammerge.recipe.types import ParameterKind, ParameterSpec, Semantics
from streammerge.statistics.rounds import Answers, Round
from streammerge.tiles.writing import Factor, Row, Sheet, Sink, equal, maximum, total, weighted_sum

EPSILON = ParameterSpec(
    name="epsilon",
    kind=ParameterKind.FLOAT,
    doc="An entry moves where its change is larger than this in magnitude.",
    default=1e-5,
    per_source=False,
    minimum=0.0,
)
R = ParameterSpec(
    name="r",
    kind=ParameterKind.FLOAT,
    doc="How much larger what one source alone moves is made, times the ratio.",
    default=0.1,
    per_source=False,
)
ALPHA = ParameterSpec(
    name="alpha",
    kind=ParameterKind.FLOAT,
    doc="The largest ratio of what is moved by others too to what is not.",
    default=0.2,
    per_source=False,
)


@dataclass(frozen=True, slots=True)
class RamParams:
    """Parameters of ``ram``."""

    epsilon: float = parameter(EPSILON)
    """What counts as a move."""


@dataclass(frozen=True, slots=True)
class RamPlusParams:
    """Parameters of ``ramplus_tl``."""

    r: float = parameter(R)
    """How much larger."""
    alpha: float = parameter(ALPHA)
    """The largest ratio."""
    epsilon: float = parameter(EPSILON)
    """What counts as a move; the least denominator of the ratio too."""
    scope: str = parameter(SCOPE)
    """``tensor`` or ``model``."""


def ram(params: RamParams) -> Work:
    """Return ``base + mean of the x_i - base that move the entry``."""

    def merge(sheet: Sheet) -> Row:
        return _mean_of_moves(sheet, params.epsilon, [1.0] * sheet.sources)

    return Work(merge)


def ramplus_tl(params: RamPlusParams) -> Work:
    """Return the same with a factor ``1 + r clip(shared_i / unique_i, 0, alpha)`` on single moves."""

    def sinks(sheet: Sheet) -> Sequence[Sink]:
        moves, movers = _moves(sheet, params.epsilon)
        alone = equal(movers, 1.0)
        return [*(total(move * alone) for move in moves), *(total(move) for move in moves)]

    def settle(answers: Answers) -> Sequence[float]:
        count = len(answers.totals) // 2
        unique, moved = answers.totals[:count], answers.totals[count:]
        return [
            1 + params.r * min(max((every - own) / max(own, params.epsilon), 0.0), params.alpha)
            for own, every in zip(unique, moved, strict=True)
        ]

    def merge(sheet: Sheet) -> Row:
        factors = [sheet.number(source) for source in range(sheet.sources)]
        return _mean_of_moves(sheet, params.epsilon, factors)

    counting = Round(sinks, settle=settle, about=(params.r, params.alpha, params.epsilon))
    return Work(merge, (counting,), Scope(params.scope))


def _moves(sheet: Sheet, epsilon: float) -> tuple[list[Row], Row]:
    """Return per source where it moves, 1 or 0, and how many do."""
    moves = [abs(vector) > epsilon for vector in sheet.task_vectors]
    return moves, weighted_sum(moves, [1.0] * len(moves))


def _mean_of_moves(sheet: Sheet, epsilon: float, factors: Sequence[Factor]) -> Row:
    moves, movers = _moves(sheet, epsilon)
    moved = [vector * move for vector, move in zip(sheet.task_vectors, moves, strict=True)]
    mean = weighted_sum(moved, [1.0] * len(moved)) / maximum(movers, 1.0)
    if all(factor == 1 for factor in factors):
        return sheet.base + mean
    alone = equal(movers, 1.0)
    # Where one moves alone, the weighted sum is that one's, and the mean has no part.
    single = weighted_sum(moved, factors) * alone
    return sheet.base + (single + (mean - mean * alone))


def _refuse(params: RamPlusParams) -> str | None:
    return refuse_unless_positive("epsilon", params.epsilon, "it is a divisor of the ratio too")


_SCALING = "what counts as a move does not grow with the task vectors"

METHODS = (
    MergeMethod(
        name="ram",
        summary="Per entry the mean over those task vectors that move it.",
        reference="Yuan et al. 2026, arXiv:2601.13572",
        params=RamParams,
        operand=Operand.TASK_VECTORS,
        work=ram,
        semantics=(Semantics.MERGEKIT, Semantics.PAPER),
        examples=({}, {"epsilon": 0.1}),
        waived={Law.SCALING: _SCALING},
    ),
    MergeMethod(
        name="ramplus_tl",
        summary="The same, with what one source alone moves made larger.",
        reference="Yuan et al. 2026, arXiv:2601.13572",
        params=RamPlusParams,
        operand=Operand.TASK_VECTORS,
        work=ramplus_tl,
        refuse=_refuse,
        semantics=(Semantics.MERGEKIT,),
        examples=({}, {"epsilon": 0.2, "r": 0.5, "alpha": 1.0}, {"epsilon": 0.2, "scope": "model"}),
        waived={Law.SCALING: _SCALING},
    ),
)
