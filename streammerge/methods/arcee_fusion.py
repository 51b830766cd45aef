"""Arcee Fusion: the base with those entries of the one source that matter unusually much.

An entry scores its change in magnitude times the Kullback-Leibler divergence of the softmax of its
row, source against base. Those are taken that score at least the median plus one and a half times the
distance of the quartiles; the quantile q of n scores is entry ``floor(q (n - 1))`` of them in order.

Source: mergekit 0.1.5 ``arcee_fusion``; the limit for outliers is Tukey's, 1977, "Exploratory data
analysis".
Differs from mergekit: quantiles are exact for tensors of any size, where it takes a million scores at
random; the result has the output's type, where it has float32.

The divergence of two softmaxes that are nearly the same is a small difference of large sums. With
``p = w / sum w`` for ``w = e**(x - max x)``, and ``q = p e**-(d + c)`` for the change d and ``c = log(1 +
sum w (e**-d - 1) / sum w)``, it is ``-sum p' log(1 + p (e**-(d + c) - 1) / p')`` with ``p' = p + 1e-8``, of
which no term loses its digits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from streammerge.methods.base import MergeMethod, Operand, Work
from streammerge.recipe.types import Semantics
from streammerge.statistics.rounds import (
    Answers,
    Found,
    Rank,
    Round,
    RowAnswers,
    RowNumbers,
    RowRound,
)
from streammerge.statistics.topk import TiePolicy
from streammerge.tiles.writing import (
    Row,
    Sheet,
    Sink,
    dot,
    exponential,
    exponential_less_one,
    largest,
    logarithm_of_one_more,
    ranked,
    total,
    where,
)

_LEAST_PROBABILITY = 1e-8
"""Is added to every probability."""
_QUANTILES = (0.25, 0.5, 0.75)
_REACH = 1.5
"""Distances of the quartiles from the median to what is unusual."""
_LARGEST, _SUM, _SHIFT, _DIVERGENCE = range(4)
"""Places of what is known of a row."""


@dataclass(frozen=True, slots=True)
class ArceeFusionParams:
    """``arcee_fusion`` has no parameters."""


def arcee_fusion(_params: ArceeFusionParams) -> Work:
    """Return the source where it scores unusually high, and the base elsewhere."""
    row_rounds = (
        RowRound(lambda sheet: [largest(sheet.values[0])], lambda answers: answers.totals),
        RowRound(_sums, _settle_sums),
        RowRound(_terms, _settle_terms),
    )

    def merge(sheet: Sheet) -> Row:
        return where(_score(sheet) >= sheet.number(0), sheet.values[0], sheet.base)

    return Work(merge, (Round(_scores, _ranks, _limit),), row_rounds=row_rounds)


def _powers(sheet: Sheet) -> Row:
    return exponential(sheet.values[0] - sheet.row_number(_LARGEST))


def _sums(sheet: Sheet) -> Sequence[Sink]:
    powers, (change,) = _powers(sheet), sheet.task_vectors
    return [total(powers), dot(powers, exponential_less_one(change * -1.0))]


def _settle_sums(answers: RowAnswers) -> RowNumbers:
    summed, differing = answers.totals.T
    return np.stack([summed, np.log1p(differing / summed)], axis=1)


def _terms(sheet: Sheet) -> Sequence[Sink]:
    (change,) = sheet.task_vectors
    probability = _powers(sheet) / sheet.row_number(_SUM)
    least = probability + _LEAST_PROBABILITY
    ratio = exponential_less_one((change + sheet.row_number(_SHIFT)) * -1.0)
    return [dot(least, logarithm_of_one_more(probability * ratio / least))]


def _settle_terms(answers: RowAnswers) -> RowNumbers:
    """Return the divergences; the softmax of one entry is 1 whatever it is, so they are 0 then."""
    return np.maximum(-answers.totals, 0.0) * (answers.numel > 1)


def _score(sheet: Sheet) -> Row:
    (change,) = sheet.task_vectors
    return abs(change) * sheet.row_number(_DIVERGENCE)


def _scores(sheet: Sheet) -> Sequence[Sink]:
    score = _score(sheet)
    return [ranked(score) for _ in _QUANTILES]


def _ranks(numel: int, _before: Found) -> Sequence[Rank]:
    return [
        Rank(numel - int(quantile * (numel - 1)), TiePolicy.INCLUSIVE, of_value=True)
        for quantile in _QUANTILES
    ]


def _limit(answers: Answers) -> Sequence[float]:
    first, median, third = (top.threshold for top in answers.tops)
    return [median + _REACH * (third - first)]


METHODS = (
    MergeMethod(
        name="arcee_fusion",
        summary="The base with those entries of one source that matter unusually much.",
        reference="mergekit",
        params=ArceeFusionParams,
        operand=Operand.TASK_VECTORS,
        work=arcee_fusion,
        semantics=(Semantics.MERGEKIT,),
        sources=(1, 1),
        examples=({},),
    ),
)
