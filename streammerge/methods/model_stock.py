"""Model Stock: the base plus so much of the mean task vector as the angles between them suggest.

Source: Jang et al. 2024, arXiv:2403.19522, the interpolation ratio for N models.
Follows: mergekit 0.1.5: products of lengths below 1e-6 count as that, a denominator within 1e-6 of 0
gives a ratio of 0, and the ratio may be negative.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from streammerge.methods.base import MergeMethod, Operand, Work
from streammerge.methods.gram import Gram, combined, gram_round
from streammerge.recipe.types import Semantics
from streammerge.tiles.writing import Row, Sheet

_LEAST = 1e-6


@dataclass(frozen=True, slots=True)
class ModelStockParams:
    """``model_stock`` has no parameters."""


def model_stock(_params: ModelStockParams) -> Work:
    """Return ``base + t mean(x_i - base)`` with ``t = N c / (1 + (N - 1) c)``, c the mean cosine."""

    def vectors(sheet: Sheet) -> Sequence[Row]:
        return sheet.task_vectors

    def merge(sheet: Sheet) -> Row:
        return sheet.base + combined(vectors(sheet), sheet)

    return Work(merge, (gram_round(vectors, _shares),))


def _shares(gram: Gram) -> Sequence[float]:
    count = len(gram)
    cosines = []
    for one, other in combinations(range(count), 2):
        lengths = max(math.sqrt(gram[one, one]) * math.sqrt(gram[other, other]), _LEAST)
        cosines.append(min(max(float(gram[one, other]) / lengths, -1.0), 1.0))
    cosine = sum(cosines) / len(cosines)
    denominator = 1 + (count - 1) * cosine
    ratio = 0.0 if abs(denominator) < _LEAST else count * cosine / denominator
    return [ratio / count] * count


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
        examples=({},),
    ),
)
