"""TIES: trim each task vector, elect a sign per element, average the entries that agree.

Source: Yadav et al. 2023, arXiv:2306.01708, Algorithm 1.
Follows: peft.utils.merge_utils.ties, on task vectors against the base.
Differs from PEFT: ties at the threshold follow ``tie_policy``; the scope may be the whole model.
Differs from the paper: trims per tensor unless ``scope: model``; a zero sum elects plus.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from streammerge.methods.base import (
    DENSITY,
    SCOPE,
    TIE_POLICY,
    WEIGHT,
    Law,
    Locality,
    MergeChunk,
    MergeMethod,
    Operand,
    Sweep,
    parameter,
    top_k_of,
)
from streammerge.methods.parts import SignVote, disjoint_mean, elect_sign
from streammerge.native.words import Combine, Keep
from streammerge.recipe.types import ParameterKind, ParameterSpec

if TYPE_CHECKING:
    from torch import Tensor

MAJORITY_SIGN_METHOD = ParameterSpec(
    name="majority_sign_method",
    kind=ParameterKind.CHOICE,
    doc="How the sign is elected: by the sum of the kept values, or of their signs.",
    default=SignVote.TOTAL.value,
    per_source=False,
    choices=tuple(vote.value for vote in SignVote),
)


@dataclass(frozen=True, slots=True)
class TiesParams:
    """Parameters of ``ties``."""

    weight: tuple[float, ...] = parameter(WEIGHT)
    """Factor per source; takes no part in the election."""
    density: tuple[float, ...] = parameter(DENSITY)
    """Fraction kept per source, in [0, 1]."""
    majority_sign_method: str = parameter(MAJORITY_SIGN_METHOD)
    """``total`` or ``frequency``."""
    scope: str = parameter(SCOPE)
    """``tensor`` or ``model``."""
    tie_policy: str = parameter(TIE_POLICY)
    """``exact``, ``inclusive`` or ``strict``."""


def ties(chunk: MergeChunk, params: TiesParams) -> Tensor:
    """Return ``base + disjoint mean of w_i trim(x_i - base)`` under the elected sign."""
    for source, row in enumerate(chunk.vectors.rows):
        chunk.trims.trim_(row, source=source)
    elected = elect_sign(chunk.vectors, SignVote(params.majority_sign_method), chunk.scratch[:2])
    merged = disjoint_mean(chunk.vectors, params.weight, elected, chunk.scratch[1:])
    return chunk.base_plus(merged)


def combine_majority(majority_sign_method: str) -> Combine:
    """Return how a sweep combines operands under an elected sign."""
    total = SignVote(majority_sign_method) is SignVote.TOTAL
    return Combine.MAJORITY_TOTAL if total else Combine.MAJORITY_FREQUENCY


def _sweep(params: TiesParams) -> Sweep:
    return Sweep(combine_majority(params.majority_sign_method), params.weight, Keep.LARGEST)


METHODS = (
    MergeMethod(
        name="ties",
        summary="Trims task vectors, elects a sign per element, averages what agrees.",
        reference="Yadav et al. 2023, arXiv:2306.01708",
        params=TiesParams,
        operand=Operand.TASK_VECTORS,
        locality=Locality.ELEMENT,
        reduction=top_k_of,
        apply=ties,
        scratch_rows=3,
        sweep=_sweep,
        examples=(
            {"density": 0.2},
            {"density": (0.2, 0.7), "weight": (0.6, -0.4)},
            {"density": 0.0},
            {"density": 1.0},
            {"density": 0.5, "majority_sign_method": "frequency"},
            {"density": 0.2, "tie_policy": "inclusive"},
            {"density": 0.2, "tie_policy": "strict"},
            {"density": 0.2, "scope": "model"},
        ),
        waived={Law.NEGATION: "an exactly balanced vote elects + whatever the signs"},
    ),
)
