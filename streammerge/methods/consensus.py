"""Consensus Merging: task arithmetic where enough tasks find the sum to hold what is theirs.

Source: Wang et al. 2024, "Localizing task information for improved model merging and compression",
arXiv:2405.07813: TALL masks ``|tau_t| >= lambda_t |tau_sum - tau_t|``, and the sum where at least
``k`` of them agree.
"""

from __future__ import annotations

from dataclasses import dataclass

from streammerge.methods.base import MergeMethod, Operand, Work, parameter
from streammerge.methods.families import LAMBDA, times
from streammerge.recipe.types import ParameterKind, ParameterSpec
from streammerge.tiles.writing import Row, Sheet, weighted_sum

K = ParameterSpec(
    name="k",
    kind=ParameterKind.INT,
    doc="Least number of masks that keep an entry: 0 keeps all, 2 what serves more than one task.",
    default=2,
    per_source=False,
    minimum=0,
    maximum=10_000,
)
MASK_LAMBDA = ParameterSpec(
    name="mask_lambda",
    kind=ParameterKind.FLOAT,
    doc="How much less of the others there must be where a task's mask keeps an entry.",
    default=0.4,
    per_source=True,
    minimum=0.0,
    maximum=1e6,
)


@dataclass(frozen=True, slots=True)
class ConsensusParams:
    """Parameters of ``consensus``."""

    k: int = parameter(K)
    """Least number of masks."""
    mask_lambda: tuple[float, ...] = parameter(MASK_LAMBDA)
    """How much less of the others there must be."""
    lambda_: float = parameter(LAMBDA)
    """Factor of the whole change."""


def consensus(params: ConsensusParams) -> Work:
    """Return ``base + lambda sum_i (x_i - base)`` where at least ``k`` masks agree."""

    def merge(sheet: Sheet) -> Row:
        vectors = sheet.task_vectors
        ones = [1.0] * len(vectors)
        whole = weighted_sum(vectors, ones)
        masks = [
            abs(vector) >= abs(whole - vector) * factor
            for vector, factor in zip(vectors, params.mask_lambda, strict=True)
        ]
        agree = weighted_sum(masks, ones) >= float(params.k)
        return sheet.base + times(whole * agree, params.lambda_)

    return Work(merge)


METHODS = (
    MergeMethod(
        name="consensus",
        summary="Task arithmetic where enough tasks find the sum to hold what is theirs.",
        reference="Wang et al. 2024, arXiv:2405.07813",
        params=ConsensusParams,
        operand=Operand.TASK_VECTORS,
        work=consensus,
        examples=({}, {"k": 1, "mask_lambda": (0.2, 1.5)}, {"k": 0, "lambda": 0.5}, {"k": 3}),
    ),
)
