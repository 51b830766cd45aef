"""Model Breadcrumbs: drop the largest and the smallest entries of each task vector, and add.

Source: Davari and Belilovsky 2023, arXiv:2312.06795, which drops the ``gamma`` largest and keeps
``density`` of all; ``breadcrumbs_ties`` elects signs as TIES does, arXiv:2306.01708.
Follows: mergekit 0.1.5: where not so many are left below the largest, fewer of those are dropped.
Differs from mergekit: of equal magnitudes the first count as the larger.
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
from streammerge.statistics.rounds import Found, Rank, Round
from streammerge.statistics.topk import TiePolicy, kept_count
from streammerge.tiles.writing import Row, Sheet, Sink, fill, in_top, keep_largest, ranked, where

GAMMA = ParameterSpec(
    name="gamma",
    kind=ParameterKind.FLOAT,
    doc="Fraction of the task vector, its largest entries, that is dropped, in [0, 1].",
    default=0.01,
    per_source=True,
    minimum=0.0,
    maximum=1.0,
)


@dataclass(frozen=True, slots=True)
class BreadcrumbsParams:
    """Parameters of ``breadcrumbs``."""

    weight: tuple[float, ...] = parameter(WEIGHT)
    """Factor per source."""
    density: tuple[float, ...] = parameter(DENSITY)
    """Fraction kept per source, in [0, 1]."""
    gamma: tuple[float, ...] = parameter(GAMMA)
    """Fraction dropped per source for being largest, in [0, 1]."""
    rescale: str = parameter(RESCALE)
    """``none`` or ``l1``."""
    divisor: str = parameter(SUM_DIVISOR)
    """``none`` or ``weights``."""
    lambda_: float = parameter(LAMBDA)
    """Factor of the whole change."""


@dataclass(frozen=True, slots=True)
class BreadcrumbsTiesParams:
    """Parameters of ``breadcrumbs_ties``."""

    weight: tuple[float, ...] = parameter(WEIGHT)
    """Factor per source."""
    density: tuple[float, ...] = parameter(DENSITY)
    """Fraction kept per source, in [0, 1]."""
    gamma: tuple[float, ...] = parameter(GAMMA)
    """Fraction dropped per source for being largest, in [0, 1]."""
    majority_sign_method: str = parameter(MAJORITY_SIGN_METHOD)
    """``total`` or ``frequency``."""
    rescale: str = parameter(RESCALE)
    """``none`` or ``l1``."""
    ballot: str = parameter(replace(BALLOT, default=Ballot.WEIGHTED.value))
    """``unweighted`` or ``weighted``."""
    divisor: str = parameter(replace(DIVISOR, default=Divisor.NONE.value))
    """``none``, ``count`` or ``weights``."""
    lambda_: float = parameter(LAMBDA)
    """Factor of the whole change."""


_Params = BreadcrumbsParams | BreadcrumbsTiesParams


def _cuts(params: _Params) -> Round:
    """Return the round that finds two ranks per source: of what is kept or larger, and of that."""

    def sinks(sheet: Sheet) -> Sequence[Sink]:
        return [ranked(vector) for _ in range(2) for vector in sheet.task_vectors]

    def ranks(numel: int, _before: Found) -> Sequence[Rank]:
        pairs = zip(params.density, params.gamma, strict=True)
        counts = [_count(numel, density, gamma) for density, gamma in pairs]
        return [
            *(Rank(kept + larger, TiePolicy.EXACT) for kept, larger in counts),
            *(Rank(larger, TiePolicy.EXACT) for _, larger in counts),
        ]

    return Round(sinks, ranks, about=(params.density, params.gamma))


def _count(numel: int, density: float, gamma: float) -> tuple[int, int]:
    """Return how many entries are kept, and how many larger ones are dropped."""
    if density >= 1:
        return numel, 0
    kept = kept_count(density, numel)
    smaller = max(0, numel - kept - kept_count(gamma, numel))
    return kept, numel - kept - smaller


def _between(sheet: Sheet) -> list[Row]:
    """Return what is kept of each task vector."""
    sources = sheet.sources
    return [
        where(in_top(vector, sources + at), fill(0.0), keep_largest(vector, at))
        for at, vector in enumerate(sheet.task_vectors)
    ]


def _rounds(params: _Params) -> tuple[Round, ...]:
    rounds = (_cuts(params),)
    if Rescale(params.rescale) is Rescale.NONE:
        return rounds
    dropping = [density < 1 for density in params.density]
    return (*rounds, l1_round(_between, dropping, ("l1",)))


def _rows(sheet: Sheet, params: _Params) -> list[Row]:
    rows = _between(sheet)
    if Rescale(params.rescale) is Rescale.NONE:
        return rows
    return [row * sheet.number(at) for at, row in enumerate(rows)]


def _kept(counts: Sequence[int]) -> Sequence[int]:
    """Return what each source keeps: what is large enough, less what is too large."""
    sources = len(counts) // 2
    return [counts[at] - counts[sources + at] for at in range(sources)]


def breadcrumbs(params: BreadcrumbsParams) -> Work:
    """Return ``base + lambda sum_i w_i between(x_i - base)``."""

    def merge(sheet: Sheet) -> Row:
        return added(
            sheet,
            _rows(sheet, params),
            params.weight,
            divisor=params.divisor,
            factor=params.lambda_,
        )

    return Work(merge, _rounds(params), kept=_kept)


def breadcrumbs_ties(params: BreadcrumbsTiesParams) -> Work:
    """Return ``base + lambda sum of w_i between(x_i - base)`` where it has the elected sign."""

    def merge(sheet: Sheet) -> Row:
        return elected(sheet, _rows(sheet, params), params)

    return Work(merge, _rounds(params), kept=_kept)


METHODS = (
    MergeMethod(
        name="breadcrumbs",
        summary="Drops the largest and the smallest entries of each task vector, adds the rest.",
        reference="Davari and Belilovsky 2023, arXiv:2312.06795",
        params=BreadcrumbsParams,
        operand=Operand.TASK_VECTORS,
        work=breadcrumbs,
        refuse=refuse_divisor,
        semantics=(Semantics.MERGEKIT, Semantics.PAPER),
        examples=(
            {"density": 0.5},
            {"density": (0.3, 0.95), "gamma": (0.2, 0.1), "weight": (0.5, -1.0)},
            {"density": 0.6, "gamma": 0.0, "rescale": "l1", "divisor": "weights", "lambda": 0.5},
            {"density": 0.0},
            {"density": 1.0},
        ),
    ),
    MergeMethod(
        name="breadcrumbs_ties",
        summary="Drops the largest and the smallest entries, elects a sign, adds what agrees.",
        reference="Davari and Belilovsky 2023, arXiv:2312.06795",
        params=BreadcrumbsTiesParams,
        operand=Operand.TASK_VECTORS,
        work=breadcrumbs_ties,
        semantics=(Semantics.MERGEKIT,),
        examples=(
            {"density": 0.5},
            {"density": (0.3, 0.7), "gamma": 0.1, "weight": (0.5, -1.0), "divisor": "weights"},
            {"density": 0.6, "rescale": "l1", "majority_sign_method": "frequency"},
            {"density": 0.0},
        ),
        waived={Law.NEGATION: "an exactly balanced vote elects + whatever the signs"},
    ),
)
