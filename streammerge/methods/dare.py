"""DARE: drop entries of each task vector at random, rescale the rest, then add or elect and merge.

Source: Yu et al. 2024, "Language models are super Mario", arXiv:2311.03099, equations 1 to 3; the
election is that of TIES, arXiv:2306.01708.
Follows: peft.utils.merge_utils.dare_linear and dare_ties, on task vectors against the base.
Differs from PEFT: the masks come from a counter-based generator, a pure function of seed, source,
tensor name and element, instead of torch's global one; density 0, whose rescaling divides by zero
there and gives NaN, drops everything here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from streammerge.methods.base import DENSITY, WEIGHT, Law, MergeMethod, Operand, Work, parameter
from streammerge.methods.ties import MAJORITY_SIGN_METHOD, agreeing_mean
from streammerge.tiles.writing import Row, Sheet, keep_random, weighted_sum


@dataclass(frozen=True, slots=True)
class DareLinearParams:
    """Parameters of ``dare_linear``."""

    weight: tuple[float, ...] = parameter(WEIGHT)
    """Factor per source."""
    density: tuple[float, ...] = parameter(DENSITY)
    """Keep probability per source, in [0, 1]."""


@dataclass(frozen=True, slots=True)
class DareTiesParams:
    """Parameters of ``dare_ties``."""

    weight: tuple[float, ...] = parameter(WEIGHT)
    """Factor per source; takes no part in the election."""
    density: tuple[float, ...] = parameter(DENSITY)
    """Keep probability per source, in [0, 1]."""
    majority_sign_method: str = parameter(MAJORITY_SIGN_METHOD)
    """``total`` or ``frequency``."""


def drop_and_rescale(sheet: Sheet, densities: Sequence[float]) -> list[Row]:
    """Return task vectors with entries dropped at random, and the rest divided by the density."""
    rows = []
    for source, (vector, density) in enumerate(zip(sheet.task_vectors, densities, strict=True)):
        kept = keep_random(vector, source, density)
        rows.append(kept / density if 0 < density < 1 else kept)
    return rows


def dare_linear(params: DareLinearParams) -> Work:
    """Return ``base + sum_i w_i drop(x_i - base) / density_i``."""

    def merge(sheet: Sheet) -> Row:
        return sheet.base + weighted_sum(drop_and_rescale(sheet, params.density), params.weight)

    return Work(merge)


def dare_ties(params: DareTiesParams) -> Work:
    """Return ``base + disjoint mean of w_i drop(x_i - base) / density_i``."""

    def merge(sheet: Sheet) -> Row:
        dropped = drop_and_rescale(sheet, params.density)
        return sheet.base + agreeing_mean(dropped, params.weight, params.majority_sign_method)

    return Work(merge)


METHODS = (
    MergeMethod(
        name="dare_linear",
        summary="Drops entries of the task vectors at random, rescales, adds.",
        reference="Yu et al. 2024, arXiv:2311.03099",
        params=DareLinearParams,
        operand=Operand.TASK_VECTORS,
        work=dare_linear,
        random=True,
        examples=(
            {"density": 0.5},
            {"density": (0.2, 1.0), "weight": (0.5, -1.0)},
            {"density": 0.0},
            {"density": 1.0},
        ),
        waived={Law.ORDER: "masks are drawn for a source by its place in the recipe"},
    ),
    MergeMethod(
        name="dare_ties",
        summary="Drops entries at random, rescales, elects a sign, averages what agrees.",
        reference="Yu et al. 2024, arXiv:2311.03099",
        params=DareTiesParams,
        operand=Operand.TASK_VECTORS,
        work=dare_ties,
        random=True,
        examples=(
            {"density": 0.5},
            {"density": (0.2, 0.9), "weight": (0.6, 0.4), "majority_sign_method": "frequency"},
            {"density": 0.0},
            {"density": 1.0},
        ),
        waived={
            Law.NEGATION: "an exactly balanced vote elects + whatever the signs",
            Law.ORDER: "masks are drawn for a source by its place in the recipe",
        },
    ),
)
