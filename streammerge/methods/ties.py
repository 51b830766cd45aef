"""TIES: trim each task vector, elect a sign per element, average the entries that agree.

Source: Yadav et al. 2023, arXiv:2306.01708, Algorithm 1.
Follows: peft.utils.merge_utils.ties, on task vectors against the base.
Differs from PEFT: ties at the threshold follow ``tie_policy``; the scope may be the whole model.
Differs from the paper: trims per tensor unless ``scope: model``; a zero sum elects plus.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
from streammerge.methods.trimming import trim_round, trimmed
from streammerge.recipe.types import ParameterKind, ParameterSpec
from streammerge.tiles.program import Vote
from streammerge.tiles.writing import Row, Sheet, majority_mean


class SignVote(StrEnum):
    """How the majority sign of an element is elected."""

    TOTAL = "total"
    """By the sign of the sum of the kept values."""
    FREQUENCY = "frequency"
    """By the sign of the sum of their signs."""


MAJORITY_SIGN_METHOD = ParameterSpec(
    name="majority_sign_method",
    kind=ParameterKind.CHOICE,
    doc="How the sign is elected: by the sum of the kept values, or of their signs.",
    default=SignVote.TOTAL.value,
    per_source=False,
    choices=tuple(vote.value for vote in SignVote),
)


@dataclass(frozen=True, slots=True)
class TiesParams:
    """Parameters of ``ties``."""

    weight: tuple[float, ...] = parameter(WEIGHT)
    """Factor per source; takes no part in the election."""
    density: tuple[float, ...] = parameter(DENSITY)
    """Fraction kept per source, in [0, 1]."""
    majority_sign_method: str = parameter(MAJORITY_SIGN_METHOD)
    """``total`` or ``frequency``."""
    scope: str = parameter(SCOPE)
    """``tensor`` or ``model``."""
    tie_policy: str = parameter(TIE_POLICY)
    """``exact``, ``inclusive`` or ``strict``."""


def ties(params: TiesParams) -> Work:
    """Return ``base + disjoint mean of w_i trim(x_i - base)`` under the elected sign."""

    def merge(sheet: Sheet) -> Row:
        return sheet.base + agreeing_mean(
            trimmed(sheet), params.weight, params.majority_sign_method
        )

    trim = trim_round(params.density, params.tie_policy)
    return Work(merge, (trim,), Scope(params.scope))


def agreeing_mean(rows: Sequence[Row], weights: Sequence[float], vote: str) -> Row:
    """Return the mean of the weighted entries that have the elected sign, over their number.

    As PEFT's: weights take no part in the election, and do not divide.
    """
    return majority_mean(
        rows, vote=Vote[SignVote(vote).name], factors=weights, shares=[1.0] * len(rows)
    )


METHODS = (
    MergeMethod(
        name="ties",
        summary="Trims task vectors, elects a sign per element, averages what agrees.",
        reference="Yadav et al. 2023, arXiv:2306.01708",
        params=TiesParams,
        operand=Operand.TASK_VECTORS,
        work=ties,
        examples=(
            {"density": 0.2},
            {"density": (0.2, 0.7), "weight": (0.6, -0.4)},
            {"density": 0.0},
            {"density": 1.0},
            {"density": 0.5, "majority_sign_method": "frequency"},
            {"density": 0.2, "tie_policy": "inclusive"},
            {"density": 0.2, "tie_policy": "strict"},
            {"density": 0.2, "scope": "model"},
        ),
        waived={Law.NEGATION: "an exactly balanced vote elects + whatever the signs"},
    ),
)
