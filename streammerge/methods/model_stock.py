"""Model Stock: the base plus so much of the mean task vector as the angles between them suggest.

Source: Jang et al. 2024, arXiv:2403.19522, the interpolation ratio for N models.
Follows: mergekit 0.1.5: products of lengths below 1e-6 count as that, a denominator within 1e-6 of 0
gives a ratio of 0, and the ratio may be negative. With ``filter_wise`` every vector along the last
dimension has a ratio of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from streammerge.methods.base import MergeMethod, Operand, Work, parameter
from streammerge.methods.gram import Gram, combined, gram_round, gram_row_round
from streammerge.recipe.types import ParameterKind, ParameterSpec, Semantics
from streammerge.tiles.writing import Row, Sheet, weighted_sum

_LEAST = 1e-6


FILTER_WISE = ParameterSpec(
    name="filter_wise",
    kind=ParameterKind.BOOL,
    doc="Whether every row has a ratio of its own, or the tensor has one.",
    default=False,
    per_source=False,
)


@dataclass(frozen=True, slots=True)
class ModelStockParams:
    """Parameters of ``model_stock``."""

    filter_wise: bool = parameter(FILTER_WISE)
    """One ratio per row."""


def model_stock(params: ModelStockParams) -> Work:
    """Return ``base + t mean(x_i - base)`` with ``t = N c / (1 + (N - 1) c)``, c the mean cosine."""
    if params.filter_wise:
        return Work(_merge_rows, row_rounds=(gram_row_round(vectors_of, _ratios),))

    def merge(sheet: Sheet) -> Row:
        return sheet.base + combined(sheet.task_vectors, sheet)

    return Work(merge, (gram_round(vectors_of, _shares),))


def vectors_of(sheet: Sheet) -> Sequence[Row]:
    """Return the task vectors."""
    return sheet.task_vectors


def _merge_rows(sheet: Sheet) -> Row:
    shares = [sheet.row_number(0)] * sheet.sources
    return sheet.base + weighted_sum(sheet.task_vectors, shares)


def _shares(gram: Gram) -> Sequence[float]:
    return [float(_ratios(gram[None])[0, 0])] * len(gram)


def _ratios(grams: Gram) -> Gram:
    """Return the share of each task vector in the result, ``[rows, 1]``, of ``[rows, n, n]``."""
    count = grams.shape[1]
    lengths = np.sqrt(np.diagonal(grams, axis1=1, axis2=2))
    cosine = np.zeros(len(grams))
    pairs = list(combinations(range(count), 2))
    for one, other in pairs:
        products = np.maximum(lengths[:, one] * lengths[:, other], _LEAST)
        cosine += np.clip(grams[:, one, other] / products, -1.0, 1.0)
    cosine /= len(pairs)
    denominator = 1 + (count - 1) * cosine
    usable = np.abs(denominator) >= _LEAST
    ratio = np.where(usable, count * cosine / np.where(usable, denominator, 1.0), 0.0)
    shares: Gram = (ratio / count)[:, None]
    return shares


METHODS = (
    MergeMethod(
        name="model_stock",
        summary="Base plus so much of the mean task vector as the angles suggest.",
        reference="Jang et al. 2024, arXiv:2403.19522",
        params=ModelStockParams,
        operand=Operand.TASK_VECTORS,
        work=model_stock,
        semantics=(Semantics.MERGEKIT, Semantics.PAPER),
        sources=(2, None),
        examples=({}, {"filter_wise": True}),
    ),
)
