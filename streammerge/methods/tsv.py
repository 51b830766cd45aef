"""TSV-Merge: the leading singular parts of all task matrices, made orthogonal to each other.

Source: Gargiulo et al. 2025, "Task singular vectors", arXiv:2412.00081. Of N task matrices each gives
its first ``min(m, n) // N`` singular triples; side by side, left and right vectors are each replaced by
the nearest orthonormal ones. Tensors that are no matrices are averaged, as in the authors' code.
Differs from the code: directions that are zero up to rounding are left out; ``min(m, n) // N`` is exact,
where a float product may fall one short.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from streammerge.lazily import torch
from streammerge.methods.base import MergeMethod, Operand, Work, parameter
from streammerge.methods.families import LAMBDA, times
from streammerge.methods.matrices import added_up, decompose, nearest_orthogonal
from streammerge.tiles.writing import Row, Sheet

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class TsvParams:
    """Parameters of ``tsv_m``."""

    lambda_: float = parameter(LAMBDA)
    """Factor of the whole change."""


def tsv_m(params: TsvParams) -> Work:
    """Return ``base + lambda U S V``, of the singular parts of all task matrices."""

    def merge(sheet: Sheet) -> Row:
        return sheet.base + times(sheet.computed(0), params.lambda_)

    return Work(merge, whole=_join, decomposes=True)


def _join(vectors: Sequence[Tensor]) -> Tensor:
    shape = vectors[0].shape
    if len(shape) != 2:
        return added_up(vectors) / len(vectors)
    rank = min(shape) // len(vectors)
    parts = [decompose(vector.double(), rank) for vector in vectors]
    left = nearest_orthogonal(torch.cat([part.left for part in parts], dim=1))
    right = nearest_orthogonal(torch.cat([part.right for part in parts], dim=0))
    return (left * torch.cat([part.values for part in parts])) @ right


METHODS = (
    MergeMethod(
        name="tsv_m",
        summary="The leading singular parts of all task matrices, made orthogonal.",
        reference="Gargiulo et al. 2025, arXiv:2412.00081",
        params=TsvParams,
        operand=Operand.TASK_VECTORS,
        work=tsv_m,
        examples=({}, {"lambda": 0.5}),
    ),
)
