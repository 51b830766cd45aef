"""DELLA: drop entries of each task vector at random, the small ones of a row sooner.

Source: Deep, Bhardwaj and Poria 2024, "DELLA-Merging", arXiv:2406.11617, MagPrune: of a row the entry
of smallest magnitude is kept with probability ``density - epsilon``, the largest with ``density +
epsilon``, the others in equal steps between; the election is that of TIES, arXiv:2306.01708.
Semantics: ``mergekit`` keeps each task vector's sum of magnitudes and, in ``della``, divides by the sum
of the agreeing weights; ``paper`` divides each kept entry by its probability, and by the number that
agree.
Differs from mergekit: rows lie along the last dimension in tensors of three dimensions, too; ranks are
exact in every type; a row of one entry has the density; of equal magnitudes the first is the larger.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from streammerge.methods.base import (
    DENSITY,
    WEIGHT,
    Law,
    MergeMethod,
    Operand,
    Work,
    parameter,
)
from streammerge.methods.families import (
    BALLOT,
    DIVISOR,
    LAMBDA,
    MAJORITY_SIGN_METHOD,
    RESCALE,
    SUM_DIVISOR,
    Ballot,
    Divisor,
    Rescale,
    added,
    elected,
    l1_round,
)
from streammerge.recipe.types import ParameterKind, ParameterSpec, Semantics
from streammerge.statistics.rounds import Round
from streammerge.tiles.writing import Row, Sheet, keep_random

EPSILON = ParameterSpec(
    name="epsilon",
    kind=ParameterKind.FLOAT,
    doc="Half the range of probabilities within a row.",
    default=0.15,
    per_source=True,
    minimum=0.0,
    maximum=0.5,
)
DELLA_RESCALE = replace(
    RESCALE,
    doc="What makes up for dropped entries: nothing, a factor that keeps the sum of magnitudes, or "
    "the probability that divides what is kept.",
    default=Rescale.L1.value,
    choices=(Rescale.NONE.value, Rescale.L1.value, Rescale.PROBABILITY.value),
    presets=((Semantics.PAPER, Rescale.PROBABILITY.value),),
)


@dataclass(frozen=True, slots=True)
class DellaLinearParams:
    """Parameters of ``della_linear``."""

    weight: tuple[float, ...] = parameter(WEIGHT)
    """Factor per source."""
    density: tuple[float, ...] = parameter(DENSITY)
    """Mean keep probability per source, in [0, 1]."""
    epsilon: tuple[float, ...] = parameter(EPSILON)
    """Half the range of probabilities per source."""
    rescale: str = parameter(DELLA_RESCALE)
    """``none``, ``l1`` or ``probability``."""
    divisor: str = parameter(SUM_DIVISOR)
    """``none`` or ``weights``."""
    lambda_: float = parameter(LAMBDA)
    """Factor of the whole change."""


@dataclass(frozen=True, slots=True)
class DellaParams:
    """Parameters of ``della``."""

    weight: tuple[float, ...] = parameter(WEIGHT)
    """Factor per source."""
    density: tuple[float, ...] = parameter(DENSITY)
    """Mean keep probability per source, in [0, 1]."""
    epsilon: tuple[float, ...] = parameter(EPSILON)
    """Half the range of probabilities per source."""
    majority_sign_method: str = parameter(MAJORITY_SIGN_METHOD)
    """``total`` or ``frequency``."""
    rescale: str = parameter(DELLA_RESCALE)
    """``none``, ``l1`` or ``probability``."""
    ballot: str = parameter(
        replace(
            BALLOT,
            default=Ballot.WEIGHTED.value,
            presets=((Semantics.PAPER, Ballot.UNWEIGHTED.value),),
        )
    )
    """``unweighted`` or ``weighted``."""
    divisor: str = parameter(
        replace(
            DIVISOR,
            default=Divisor.WEIGHTS.value,
            presets=((Semantics.PAPER, Divisor.COUNT.value),),
        )
    )
    """``none``, ``count`` or ``weights``."""
    lambda_: float = parameter(LAMBDA)
    """Factor of the whole change."""


_Params = DellaLinearParams | DellaParams


def _probabilities(sheet: Sheet, params: _Params) -> list[Row | float]:
    """Return the keep probability of each entry, for every source."""
    return [
        sheet.computed(source) * (2 * epsilon) + (density - epsilon) if 0 < density < 1 else density
        for source, (density, epsilon) in enumerate(
            zip(params.density, params.epsilon, strict=True)
        )
    ]


def _dropped(sheet: Sheet, params: _Params) -> list[Row]:
    return [
        keep_random(vector, source, probability)
        for source, (vector, probability) in enumerate(
            zip(sheet.task_vectors, _probabilities(sheet, params), strict=True)
        )
    ]


def _kept(sheet: Sheet, params: _Params) -> list[Row]:
    """Return task vectors with entries dropped at random, and the rest rescaled."""
    rescale = Rescale(params.rescale)
    probabilities = _probabilities(sheet, params)
    rows = []
    for source, (vector, probability) in enumerate(
        zip(sheet.task_vectors, probabilities, strict=True)
    ):
        kept = keep_random(vector, source, probability)
        if isinstance(probability, Row) and rescale is Rescale.PROBABILITY:
            kept = kept / probability
        elif isinstance(probability, Row) and rescale is Rescale.L1:
            kept = kept * sheet.number(source)
        rows.append(kept)
    return rows


def _rounds(params: _Params) -> tuple[Round, ...]:
    dropping = [0 < density < 1 for density in params.density]
    if Rescale(params.rescale) is not Rescale.L1 or not any(dropping):
        return ()
    about = (params.density, params.epsilon)
    return (l1_round(lambda sheet: _dropped(sheet, params), dropping, about),)


def _refuse(params: _Params) -> str | None:
    """Return which probabilities are none; mergekit refuses the same."""
    for density, epsilon in zip(params.density, params.epsilon, strict=True):
        if 0 < density < 1 and not 0 < density - epsilon <= density + epsilon < 1:
            return (
                f"epsilon: {epsilon:g} around density {density:g} makes probabilities from {density - epsilon:g} to "
                f"{density + epsilon:g}, which have to lie between 0 and 1; give an epsilon below "
                f"{min(density, 1 - density):g}"
            )
    return None


def _ranks(sheet: Sheet) -> Sequence[Row]:
    return sheet.task_vectors


def della_linear(params: DellaLinearParams) -> Work:
    """Return ``base + lambda sum_i w_i drop(x_i - base)``, rescaled."""

    def merge(sheet: Sheet) -> Row:
        return added(
            sheet,
            _kept(sheet, params),
            params.weight,
            divisor=params.divisor,
            factor=params.lambda_,
        )

    return Work(merge, _rounds(params), row_ranks=_ranks)


def della(params: DellaParams) -> Work:
    """Return ``base + lambda disjoint mean of w_i drop(x_i - base)``, rescaled."""

    def merge(sheet: Sheet) -> Row:
        return elected(sheet, _kept(sheet, params), params)

    return Work(merge, _rounds(params), row_ranks=_ranks)


METHODS = (
    MergeMethod(
        name="della_linear",
        summary="Drops entries at random, small ones of a row sooner, rescales, adds.",
        reference="Deep et al. 2024, arXiv:2406.11617",
        params=DellaLinearParams,
        operand=Operand.TASK_VECTORS,
        work=della_linear,
        refuse=_refuse,
        semantics=(Semantics.MERGEKIT, Semantics.PAPER),
        random=True,
        examples=(
            {"density": 0.5},
            {"density": (0.4, 1.0), "epsilon": 0.3, "weight": (0.5, -1.0)},
            {"density": 0.6, "rescale": "probability", "divisor": "weights", "lambda": 0.5},
            {"density": 0.0},
        ),
        waived={Law.ORDER: "masks are drawn for a source by its place in the recipe"},
    ),
    MergeMethod(
        name="della",
        summary="Drops entries at random, small ones of a row sooner, elects a sign, averages.",
        reference="Deep et al. 2024, arXiv:2406.11617",
        params=DellaParams,
        operand=Operand.TASK_VECTORS,
        work=della,
        refuse=_refuse,
        semantics=(Semantics.MERGEKIT, Semantics.PAPER),
        random=True,
        examples=(
            {"density": 0.5},
            {"density": (0.4, 0.7), "epsilon": (0.1, 0.2), "weight": (0.6, 0.4)},
            {"density": 0.6, "rescale": "probability", "ballot": "unweighted", "divisor": "count"},
            {"density": 0.5, "rescale": "none", "majority_sign_method": "frequency"},
        ),
        waived={
            Law.NEGATION: "an exactly balanced vote elects + whatever the signs",
            Law.ORDER: "masks are drawn for a source by its place in the recipe",
        },
    ),
)
