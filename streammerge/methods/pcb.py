"""PCB-Merging: entries compete within their task and across tasks; the best share what is left.

Source: Du et al. 2024, "Parameter competition balancing for model merging", arXiv:2410.02396, section 3.
Follows: the authors' code (``pcb-merging.py``), which clamps magnitudes to quantiles, scores by
``exp`` and ``tanh`` in place of the paper's softmaxes, and weighs by scores that are mapped onto [0, 1];
it takes the whole model as one vector, as ``scope: model`` does.
Differs from the code, which gives no numbers there: where the magnitudes of a task vector have no
range, all are mapped to 0; where scores have none, those above 0 weigh 1 and others 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from streammerge.methods.base import (
    SCOPE,
    WEIGHT,
    Law,
    MergeMethod,
    Operand,
    Scope,
    Work,
    parameter,
)
from streammerge.methods.families import LAMBDA, times
from streammerge.recipe.types import ParameterKind, ParameterSpec
from streammerge.statistics.rounds import Answers, Found, Rank, Round
from streammerge.statistics.topk import TiePolicy
from streammerge.tiles.writing import (
    Row,
    Sheet,
    Sink,
    equal,
    exponential,
    hyperbolic_tangent,
    largest,
    maximum,
    minimum,
    ranked,
    sign,
    weighted_sum,
)

_LEAST_DIVISOR = 1e-12
"""Sums of shares are divided by as if they were at least this."""
_BEYOND = 1e38
"""More than any score: e**64 at most."""
_OF_MAGNITUDES = 4
"""Numbers per source that the first round finds: limits, the smallest magnitude, the range."""
_OF_SCORES = 3
"""Numbers per source that the second one finds: where shares begin, their range, and what is whole."""

RATIO = ParameterSpec(
    name="ratio",
    kind=ParameterKind.FLOAT,
    doc="Fraction of each task vector, its best entries, that weighs anything, in [0, 1].",
    default=0.1,
    per_source=False,
    minimum=0.0,
    maximum=1.0,
)
CLAMP = ParameterSpec(
    name="clamp",
    kind=ParameterKind.FLOAT,
    doc="Fraction of the magnitudes at either end that is clamped to the others, in [0, 0.5].",
    default=0.0001,
    per_source=False,
    minimum=0.0,
    maximum=0.5,
)


@dataclass(frozen=True, slots=True)
class PcbParams:
    """Parameters of ``pcb``."""

    weight: tuple[float, ...] = parameter(WEIGHT)
    """Factor per source, the paper's lambdas; no part of the divisor."""
    ratio: float = parameter(RATIO)
    """Fraction of each task vector that weighs anything, in [0, 1]."""
    clamp: float = parameter(CLAMP)
    """The quantile to which magnitudes are clamped, at either end, in [0, 0.5]."""
    scope: str = parameter(SCOPE)
    """``tensor`` or ``model``."""
    lambda_: float = parameter(LAMBDA)
    """Factor of the whole change."""


def pcb(params: PcbParams) -> Work:
    """Return ``base + lambda sum_i w_i s_i clamped(x_i - base) / sum_i s_i``, s the shares."""

    def merge(sheet: Sheet) -> Row:
        votes = _votes(sheet)
        shares = [_share(sheet, source, votes) for source in range(sheet.sources)]
        clamped = [
            sign(vector) * _clamped(sheet, source)
            for source, vector in enumerate(sheet.task_vectors)
        ]
        won = [vector * share for vector, share in zip(clamped, shares, strict=True)]
        divisor = maximum(weighted_sum(shares, [1.0] * len(shares)), _LEAST_DIVISOR)
        merged = weighted_sum(won, params.weight) / divisor
        return sheet.base + times(merged, params.lambda_)

    return Work(merge, (_limits(params), _cuts(params)), Scope(params.scope))


def _limits(params: PcbParams) -> Round:
    """Return the round that finds to what magnitudes are clamped, and the range that is left."""

    def sinks(sheet: Sheet) -> Sequence[Sink]:
        vectors = sheet.task_vectors
        return [
            *(ranked(vector) for _ in range(2) for vector in vectors),
            *(largest(equal(vector, 0.0)) for vector in vectors),
        ]

    def ranks(numel: int, _before: Found) -> Sequence[Rank]:
        low = _quantile(int(numel * params.clamp), numel)
        high = _quantile(int(numel * (1 - params.clamp) - 1), numel)
        return [rank for rank in (low, high) for _ in params.weight]

    def settle(answers: Answers) -> Sequence[float]:
        count = len(answers.totals)
        thresholds = [top.threshold for top in answers.tops]
        numbers: list[float] = []
        for low, high, has_zeros in zip(
            thresholds[:count], thresholds[count:], answers.totals, strict=True
        ):
            # An entry that does not change has no sign, and stays 0 whatever the lower limit.
            smallest = 0.0 if has_zeros > 0 else min(low, high)
            numbers += [low, high, smallest, (high - smallest) or 1.0]
        return numbers

    return Round(sinks, ranks, settle, about=(params.clamp,))


def _cuts(params: PcbParams) -> Round:
    """Return the round that finds which scores are large enough, and the largest of them.

    Scores may be negative: what is above 0 and what is below are ranked each by itself.
    """

    def sinks(sheet: Sheet) -> Sequence[Sink]:
        votes = _votes(sheet)
        scores = [_score(sheet, source, votes) for source in range(sheet.sources)]
        return [
            *(ranked(maximum(score, 0.0)) for score in scores),
            *(ranked(minimum(score, 0.0)) for score in scores),
            *(largest(score) for score in scores),
        ]

    def ranks(numel: int, _before: Found) -> Sequence[Rank]:
        index = int(numel * (1 - params.ratio))
        above = _quantile(index, numel)
        # The same entry from the other end.
        below = _quantile(numel - 1 - min(index, numel - 1), numel)
        return [rank for rank in (above, below) for _ in params.weight]

    def settle(answers: Answers) -> Sequence[float]:
        count = len(answers.totals)
        thresholds = [top.threshold for top in answers.tops]
        numbers: list[float] = []
        for above, below, best in zip(
            thresholds[:count], thresholds[count:], answers.totals, strict=True
        ):
            # One of the two is 0, on whose side the entry does not lie.
            cut = above - below
            if best <= cut:
                numbers += [cut, 1.0, best if best > 0 else _BEYOND]
            else:
                numbers += [cut, best - cut, _BEYOND]
        return numbers

    return Round(sinks, ranks, settle, about=(params.ratio,))


def _quantile(index: int, numel: int) -> Rank:
    """Return the wish for the value that has a place, from 0, among sorted ones."""
    return Rank(numel - min(max(index, 0), max(numel - 1, 0)), TiePolicy.INCLUSIVE, of_value=True)


def _votes(sheet: Sheet) -> Row:
    return weighted_sum(sheet.task_vectors, [1.0] * sheet.sources)


def _clamped(sheet: Sheet, source: int) -> Row:
    """Return the magnitudes of a task vector, clamped; the upper limit wins where the two cross."""
    first = _OF_MAGNITUDES * source
    raised = maximum(abs(sheet.task_vectors[source]), sheet.number(first))
    return minimum(raised, sheet.number(first + 1))


def _score(sheet: Sheet, source: int, votes: Row) -> Row:
    """Return ``exp(N n^2) tanh(t sum_j t_j)``, n the clamped magnitudes mapped onto [0, 1]."""
    first = _OF_MAGNITUDES * source
    above = _clamped(sheet, source) - sheet.number(first + 2)
    normed = above / sheet.number(first + 3)
    within = exponential(normed * normed * float(sheet.sources))
    return within * hyperbolic_tangent(sheet.task_vectors[source] * votes)


def _share(sheet: Sheet, source: int, votes: Row) -> Row:
    """Return the scores from the cut on, mapped onto [0, 1]; 1 for the best where all are alike."""
    first = _OF_MAGNITUDES * sheet.sources + _OF_SCORES * source
    cut = sheet.number(first)
    score = _score(sheet, source, votes)
    mapped = (maximum(score, cut) - cut) / sheet.number(first + 1)
    return mapped + (score >= sheet.number(first + 2))


METHODS = (
    MergeMethod(
        name="pcb",
        summary="Entries compete within and across task vectors; the best are averaged by score.",
        reference="Du et al. 2024, arXiv:2410.02396",
        params=PcbParams,
        operand=Operand.TASK_VECTORS,
        work=pcb,
        sources=(1, 64),
        examples=(
            {},
            {"ratio": 0.4, "clamp": 0.01, "weight": (0.5, -1.5), "lambda": 0.7},
            {"ratio": 1.0, "clamp": 0.0},
            {"ratio": 0.0},
            {"ratio": 0.2, "scope": "model"},
        ),
        waived={Law.SCALING: "scores across task vectors saturate where their products are large"},
    ),
)
