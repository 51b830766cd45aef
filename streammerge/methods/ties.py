"""TIES: trim each task vector, elect a sign per element, average the entries that agree.

Source: Yadav et al. 2023, arXiv:2306.01708, Algorithm 1.
Semantics: ``peft`` follows peft.utils.merge_utils.ties on task vectors against the base;
``mergekit`` weighs before it votes, divides by the sum of the agreeing weights, and keeps at least
one entry; ``paper`` follows the authors' notebook: the ``int(density n) + 1`` largest of the whole
model with all that equal the smallest of them, and a vote of zero elects the whole model's sign.
Differs from PEFT: ties at the threshold follow ``tie_policy``; the scope may be the whole model.
Differs from mergekit: of equal magnitudes the first are kept, where its order is that of a sort.
Differs from the notebook: a density of 1 keeps everything, where it fails, and one of 0 nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from streammerge.methods.base import (
    DENSITY,
    SCOPE,
    TIE_POLICY,
    WEIGHT,
    Law,
    MergeMethod,
    Operand,
    Scope,
    Work,
    parameter,
)
from streammerge.methods.families import (
    BALLOT,
    DIVISOR,
    LAMBDA,
    MAJORITY_SIGN_METHOD,
    RESCALE,
    Ballot,
    Divisor,
    Rescale,
    SignVote,
    ballots,
    elected,
    l1_round,
)
from streammerge.methods.trimming import KEPT_COUNT, trim_round, trimmed
from streammerge.recipe.types import ParameterKind, ParameterSpec, Semantics
from streammerge.statistics.rounds import Answers, Round
from streammerge.statistics.topk import TiePolicy
from streammerge.tiles.writing import Factor, Row, Sheet, Sink, sign, total, weighted_sum


class Cancelled(StrEnum):
    """What a vote of zero elects."""

    PLUS = "plus"
    """Plus."""
    MAJORITY = "majority"
    """The sign that most elements of the scope elect; minus, if as many elect either."""


CANCELLED = ParameterSpec(
    name="cancelled",
    kind=ParameterKind.CHOICE,
    doc="What a vote of zero elects: plus, or the sign that most elements of the scope elect.",
    default=Cancelled.PLUS.value,
    per_source=False,
    choices=tuple(Cancelled),
    per_tensor=False,
    presets=((Semantics.PAPER, Cancelled.MAJORITY.value),),
)


@dataclass(frozen=True, slots=True)
class TiesParams:
    """Parameters of ``ties``."""

    weight: tuple[float, ...] = parameter(WEIGHT)
    """Factor per source."""
    density: tuple[float, ...] = parameter(DENSITY)
    """Fraction kept per source, in [0, 1]."""
    majority_sign_method: str = parameter(MAJORITY_SIGN_METHOD)
    """``total`` or ``frequency``."""
    scope: str = parameter(replace(SCOPE, presets=((Semantics.PAPER, Scope.MODEL.value),)))
    """``tensor`` or ``model``."""
    tie_policy: str = parameter(
        replace(TIE_POLICY, presets=((Semantics.PAPER, TiePolicy.INCLUSIVE.value),))
    )
    """``exact``, ``inclusive`` or ``strict``."""
    kept_count: str = parameter(KEPT_COUNT)
    """``floor``, ``at least one`` or ``one more``."""
    ballot: str = parameter(replace(BALLOT, presets=((Semantics.MERGEKIT, Ballot.WEIGHTED.value),)))
    """``unweighted`` or ``weighted``."""
    divisor: str = parameter(
        replace(DIVISOR, presets=((Semantics.MERGEKIT, Divisor.WEIGHTS.value),))
    )
    """``none``, ``count`` or ``weights``."""
    cancelled: str = parameter(CANCELLED)
    """``plus`` or ``majority``."""
    rescale: str = parameter(RESCALE)
    """``none`` or ``l1``."""
    lambda_: float = parameter(LAMBDA)
    """Factor of the whole change."""


def ties(params: TiesParams) -> Work:
    """Return ``base + disjoint mean of w_i trim(x_i - base)`` under the elected sign."""
    sources = len(params.density)
    rounds = [trim_round(params.density, params.tie_policy, params.kept_count)]
    rescales = Rescale(params.rescale) is Rescale.L1
    if rescales:
        dropping = [density < 1 for density in params.density]
        rounds.append(l1_round(trimmed, dropping, ("l1",)))

    def rows(sheet: Sheet) -> Sequence[Row]:
        kept = trimmed(sheet)
        return [row * sheet.number(at) for at, row in enumerate(kept)] if rescales else kept

    zero_elects = Cancelled(params.cancelled)
    if zero_elects is Cancelled.MAJORITY:
        rounds.append(_majority_round(rows, params))

    def merge(sheet: Sheet) -> Row:
        of_zero: Factor = 1.0
        if zero_elects is Cancelled.MAJORITY:
            of_zero = sheet.number(sources if rescales else 0)
        return elected(sheet, rows(sheet), params, of_zero)

    return Work(merge, tuple(rounds), Scope(params.scope))


def _majority_round(rows: Callable[[Sheet], Sequence[Row]], params: TiesParams) -> Round:
    """Return the round that finds the sign which most elements elect."""

    def sinks(sheet: Sheet) -> Sequence[Sink]:
        votes = ballots(rows(sheet), params)
        if SignVote(params.majority_sign_method) is SignVote.FREQUENCY:
            votes = [sign(vote) for vote in votes]
        return [total(sign(weighted_sum(votes, [1.0] * len(votes))))]

    def settle(answers: Answers) -> Sequence[float]:
        return [1.0 if answers.totals[0] > 0 else -1.0]

    return Round(sinks, settle=settle, about=(params.majority_sign_method, *_voters(params)))


def _voters(params: TiesParams) -> tuple[float, ...]:
    """Return the weights, if they vote."""
    return params.weight if Ballot(params.ballot) is Ballot.WEIGHTED else ()


METHODS = (
    MergeMethod(
        name="ties",
        summary="Trims task vectors, elects a sign per element, averages what agrees.",
        reference="Yadav et al. 2023, arXiv:2306.01708",
        params=TiesParams,
        operand=Operand.TASK_VECTORS,
        work=ties,
        semantics=(Semantics.PEFT, Semantics.MERGEKIT, Semantics.PAPER),
        examples=(
            {"density": 0.2},
            {"density": (0.2, 0.7), "weight": (0.6, -0.4)},
            {"density": 0.0},
            {"density": 1.0},
            {"density": 0.5, "majority_sign_method": "frequency"},
            {"density": 0.2, "tie_policy": "inclusive"},
            {"density": 0.2, "tie_policy": "strict"},
            {"density": 0.2, "scope": "model"},
            {
                "density": (0.2, 0.6),
                "weight": (0.75, -0.5),
                "ballot": "weighted",
                "divisor": "weights",
            },
            {"density": 0.4, "kept_count": "at least one", "rescale": "l1", "lambda": 0.5},
            {"density": 0.2, "cancelled": "majority", "kept_count": "one more"},
            {"density": 0.2, "cancelled": "majority", "rescale": "l1", "scope": "model"},
            {"density": 0.3, "divisor": "none"},
        ),
        waived={Law.NEGATION: "an exactly balanced vote elects + whatever the signs"},
    ),
)
