"""Magnitude prune: the base plus a weighted sum of task vectors trimmed to their largest entries.

Source: the trim step of TIES, Yadav et al. 2023, arXiv:2306.01708, without the sign election.
Follows: peft.utils.merge_utils.magnitude_prune, on task vectors against the base.
Differs from PEFT: ties at the threshold follow ``tie_policy``; the scope may be the whole model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from streammerge.methods.base import (
    DENSITY,
    SCOPE,
    TIE_POLICY,
    WEIGHT,
    Locality,
    MergeChunk,
    MergeMethod,
    Operand,
    Sweep,
    parameter,
    top_k_of,
)
from streammerge.methods.parts import sum_rows, weigh_
from streammerge.native.words import Combine, Keep

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class MagnitudePruneParams:
    """Parameters of ``magnitude_prune``."""

    weight: tuple[float, ...] = parameter(WEIGHT)
    """Factor per source."""
    density: tuple[float, ...] = parameter(DENSITY)
    """Fraction kept per source, in [0, 1]."""
    scope: str = parameter(SCOPE)
    """``tensor`` or ``model``."""
    tie_policy: str = parameter(TIE_POLICY)
    """``exact``, ``inclusive`` or ``strict``."""


def magnitude_prune(chunk: MergeChunk, params: MagnitudePruneParams) -> Tensor:
    """Return ``base + sum_i w_i trim(x_i - base)``."""
    for source, row in enumerate(chunk.vectors.rows):
        chunk.trims.trim_(row, source=source)
    merged = sum_rows(weigh_(chunk.vectors, params.weight), chunk.scratch[0])
    return chunk.base_plus(merged)


METHODS = (
    MergeMethod(
        name="magnitude_prune",
        summary="Base plus the weighted sum of the largest entries of each task vector.",
        reference="Yadav et al. 2023, arXiv:2306.01708 (trim step)",
        params=MagnitudePruneParams,
        operand=Operand.TASK_VECTORS,
        locality=Locality.ELEMENT,
        reduction=top_k_of,
        apply=magnitude_prune,
        scratch_rows=1,
        sweep=lambda params: Sweep(Combine.SUM, params.weight, Keep.LARGEST),
        examples=(
            {"density": 0.3, "weight": (0.5, 1.0)},
            {"density": (0.1, 0.8)},
            {"density": 0.0},
            {"density": 1.0},
            {"density": 0.3, "tie_policy": "inclusive"},
            {"density": 0.3, "scope": "model"},
        ),
    ),
)
