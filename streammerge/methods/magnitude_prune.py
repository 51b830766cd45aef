"""Magnitude prune: the base plus a weighted sum of task vectors trimmed to their largest entries.

Source: the trim step of TIES, Yadav et al. 2023, arXiv:2306.01708, without the sign election.
Follows: peft.utils.merge_utils.magnitude_prune, on task vectors against the base.
Differs from PEFT: ties at the threshold follow ``tie_policy``; the scope may be the whole model.
"""

from __future__ import annotations

from dataclasses import dataclass

from streammerge.methods.base import (
    DENSITY,
    SCOPE,
    TIE_POLICY,
    WEIGHT,
    MergeMethod,
    Operand,
    Scope,
    Work,
    parameter,
)
from streammerge.methods.trimming import trim_round, trimmed
from streammerge.recipe.types import Semantics
from streammerge.tiles.writing import Row, Sheet, weighted_sum


@dataclass(frozen=True, slots=True)
class MagnitudePruneParams:
    """Parameters of ``magnitude_prune``."""

    weight: tuple[float, ...] = parameter(WEIGHT)
    """Factor per source."""
    density: tuple[float, ...] = parameter(DENSITY)
    """Fraction kept per source, in [0, 1]."""
    scope: str = parameter(SCOPE)
    """``tensor`` or ``model``."""
    tie_policy: str = parameter(TIE_POLICY)
    """``exact``, ``inclusive`` or ``strict``."""


def magnitude_prune(params: MagnitudePruneParams) -> Work:
    """Return ``base + sum_i w_i trim(x_i - base)``."""

    def merge(sheet: Sheet) -> Row:
        return sheet.base + weighted_sum(trimmed(sheet), params.weight)

    trim = trim_round(params.density, params.tie_policy)
    return Work(merge, (trim,), Scope(params.scope))


METHODS = (
    MergeMethod(
        name="magnitude_prune",
        summary="Base plus the weighted sum of the largest entries of each task vector.",
        reference="Yadav et al. 2023, arXiv:2306.01708 (trim step)",
        params=MagnitudePruneParams,
        operand=Operand.TASK_VECTORS,
        work=magnitude_prune,
        semantics=(Semantics.PEFT,),
        examples=(
            {"density": 0.3, "weight": (0.5, 1.0)},
            {"density": (0.1, 0.8)},
            {"density": 0.0},
            {"density": 1.0},
            {"density": 0.3, "tie_policy": "inclusive"},
            {"density": 0.3, "scope": "model"},
        ),
    ),
)
