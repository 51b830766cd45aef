"""DARE: drop entries of each task vector at random, rescale the rest, then add or elect and merge.

Source: Yu et al. 2024, "Language models are super Mario", arXiv:2311.03099, equations 1 to 3; the
election is that of TIES, arXiv:2306.01708; ``rescale_by`` is the q of DAREx-q, Deng et al. 2024,
arXiv:2410.09344.
Semantics: ``peft`` follows peft.utils.merge_utils.dare_linear and dare_ties on task vectors against
the base; ``mergekit`` keeps each task vector's sum of magnitudes instead of dividing by the density,
weighs before it votes and does not divide; ``paper`` divides by the density, as PEFT does.
Differs from PEFT and mergekit: the masks come from a counter-based generator, a pure function of
seed, source, tensor name and element, instead of torch's global one; density 0, whose rescaling
divides by zero in PEFT and gives NaN, drops everything here.
Differs from the paper: ``dare_ties`` does not trim once more after dropping.
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
    refuse_divisor,
)
from streammerge.recipe.types import ParameterKind, ParameterSpec, Semantics
from streammerge.statistics.rounds import Round
from streammerge.tiles.writing import Row, Sheet, keep_random

DROP_RESCALE = replace(
    RESCALE,
    doc="What makes up for dropped entries: nothing, the density that divides what is kept, or a "
    "factor that keeps the sum of magnitudes.",
    default=Rescale.DENSITY.value,
    choices=(Rescale.NONE.value, Rescale.DENSITY.value, Rescale.L1.value),
    presets=((Semantics.MERGEKIT, Rescale.L1.value),),
)
RESCALE_BY = ParameterSpec(
    name="rescale_by",
    kind=ParameterKind.FLOAT,
    doc="What divides the kept entries in place of the density, in [0, 1]; 0 for the density itself.",
    default=0.0,
    per_source=True,
    minimum=0.0,
    maximum=1.0,
)


@dataclass(frozen=True, slots=True)
class DareLinearParams:
    """Parameters of ``dare_linear``."""

    weight: tuple[float, ...] = parameter(WEIGHT)
    """Factor per source."""
    density: tuple[float, ...] = parameter(DENSITY)
    """Keep probability per source, in [0, 1]."""
    rescale: str = parameter(DROP_RESCALE)
    """``none``, ``density`` or ``l1``."""
    rescale_by: tuple[float, ...] = parameter(RESCALE_BY)
    """What divides in place of the density; 0 for the density."""
    divisor: str = parameter(SUM_DIVISOR)
    """``none`` or ``weights``."""
    lambda_: float = parameter(LAMBDA)
    """Factor of the whole change."""


@dataclass(frozen=True, slots=True)
class DareTiesParams:
    """Parameters of ``dare_ties``."""

    weight: tuple[float, ...] = parameter(WEIGHT)
    """Factor per source."""
    density: tuple[float, ...] = parameter(DENSITY)
    """Keep probability per source, in [0, 1]."""
    majority_sign_method: str = parameter(MAJORITY_SIGN_METHOD)
    """``total`` or ``frequency``."""
    rescale: str = parameter(DROP_RESCALE)
    """``none``, ``density`` or ``l1``."""
    rescale_by: tuple[float, ...] = parameter(RESCALE_BY)
    """What divides in place of the density; 0 for the density."""
    ballot: str = parameter(replace(BALLOT, presets=((Semantics.MERGEKIT, Ballot.WEIGHTED.value),)))
    """``unweighted`` or ``weighted``."""
    divisor: str = parameter(replace(DIVISOR, presets=((Semantics.MERGEKIT, Divisor.NONE.value),)))
    """``none``, ``count`` or ``weights``."""
    lambda_: float = parameter(LAMBDA)
    """Factor of the whole change."""


def _dropped(sheet: Sheet, densities: Sequence[float]) -> list[Row]:
    return [
        keep_random(vector, source, density)
        for source, (vector, density) in enumerate(zip(sheet.task_vectors, densities, strict=True))
    ]


def _kept(sheet: Sheet, params: DareLinearParams | DareTiesParams) -> list[Row]:
    """Return task vectors with entries dropped at random, and the rest rescaled."""
    rows = _dropped(sheet, params.density)
    match Rescale(params.rescale):
        case Rescale.DENSITY:
            divisors = [
                by or density for by, density in zip(params.rescale_by, params.density, strict=True)
            ]
            return [
                row / divisor if 0 < density < 1 else row
                for row, density, divisor in zip(rows, params.density, divisors, strict=True)
            ]
        case Rescale.L1:
            return [
                row * sheet.number(source) if 0 < density < 1 else row
                for source, (row, density) in enumerate(zip(rows, params.density, strict=True))
            ]
        case _:
            return rows


def _rounds(params: DareLinearParams | DareTiesParams) -> tuple[Round, ...]:
    dropping = [0 < density < 1 for density in params.density]
    if Rescale(params.rescale) is not Rescale.L1 or not any(dropping):
        return ()
    return (l1_round(lambda sheet: _dropped(sheet, params.density), dropping, params.density),)


def dare_linear(params: DareLinearParams) -> Work:
    """Return ``base + lambda sum_i w_i drop(x_i - base) / density_i``."""

    def merge(sheet: Sheet) -> Row:
        return added(
            sheet,
            _kept(sheet, params),
            params.weight,
            divisor=params.divisor,
            factor=params.lambda_,
        )

    return Work(merge, _rounds(params))


def dare_ties(params: DareTiesParams) -> Work:
    """Return ``base + lambda disjoint mean of w_i drop(x_i - base) / density_i``."""

    def merge(sheet: Sheet) -> Row:
        return elected(sheet, _kept(sheet, params), params)

    return Work(merge, _rounds(params))


def _refuse_unused(params: DareLinearParams | DareTiesParams) -> str | None:
    """Return that a divisor divides nothing, where it does not."""
    if Rescale(params.rescale) is Rescale.DENSITY or not any(params.rescale_by):
        return None
    return (
        f"rescale_by: {list(params.rescale_by)} divide what is kept under `rescale: density`, and the "
        f"recipe has `rescale: {params.rescale}`; leave `rescale_by` out or change `rescale`"
    )


_SEMANTICS = (Semantics.PEFT, Semantics.MERGEKIT, Semantics.PAPER)

METHODS = (
    MergeMethod(
        name="dare_linear",
        summary="Drops entries of the task vectors at random, rescales, adds.",
        reference="Yu et al. 2024, arXiv:2311.03099",
        params=DareLinearParams,
        operand=Operand.TASK_VECTORS,
        work=dare_linear,
        refuse=lambda params: refuse_divisor(params) or _refuse_unused(params),
        semantics=_SEMANTICS,
        random=True,
        examples=(
            {"density": 0.5},
            {"density": (0.2, 1.0), "weight": (0.5, -1.0)},
            {"density": 0.0},
            {"density": 1.0},
            {"density": (0.5, 0.7), "rescale": "l1", "divisor": "weights", "lambda": 0.5},
            {"density": 0.5, "rescale_by": 0.25},
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
        refuse=_refuse_unused,
        semantics=_SEMANTICS,
        random=True,
        examples=(
            {"density": 0.5},
            {"density": (0.2, 0.9), "weight": (0.6, 0.4), "majority_sign_method": "frequency"},
            {"density": 0.0},
            {"density": 1.0},
            {"density": 0.6, "weight": (0.6, -0.4), "rescale": "l1", "ballot": "weighted"},
            {"density": 0.5, "rescale": "none", "divisor": "none"},
        ),
        waived={
            Law.NEGATION: "an exactly balanced vote elects + whatever the signs",
            Law.ORDER: "masks are drawn for a source by its place in the recipe",
        },
    ),
)
