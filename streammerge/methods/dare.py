"""DARE: drop entries of each task vector at random, rescale the rest, then add or elect and merge.

Source: Yu et al. 2024, "Language models are super Mario", arXiv:2311.03099, equations 1 to 3; the
election is that of TIES, arXiv:2306.01708.
Follows: peft.utils.merge_utils.dare_linear and dare_ties, on task vectors against the base.
Differs from PEFT: the masks come from a counter-based generator, a pure function of seed, source,
tensor name and element, instead of torch's global one; density 0, whose rescaling divides by zero
there and gives NaN, drops everything here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from streammerge.methods.base import (
    DENSITY,
    WEIGHT,
    Law,
    Locality,
    MergeChunk,
    MergeMethod,
    Operand,
    Stack,
    Sweep,
    parameter,
)
from streammerge.methods.parts import SignVote, disjoint_mean, divide_, elect_sign, sum_rows, weigh_
from streammerge.methods.ties import MAJORITY_SIGN_METHOD, combine_majority
from streammerge.native.words import Combine, Keep

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class DareLinearParams:
    """Parameters of ``dare_linear``."""

    weight: tuple[float, ...] = parameter(WEIGHT)
    """Factor per source."""
    density: tuple[float, ...] = parameter(DENSITY)
    """Keep probability per source, in [0, 1]."""


@dataclass(frozen=True, slots=True)
class DareTiesParams:
    """Parameters of ``dare_ties``."""

    weight: tuple[float, ...] = parameter(WEIGHT)
    """Factor per source; takes no part in the election."""
    density: tuple[float, ...] = parameter(DENSITY)
    """Keep probability per source, in [0, 1]."""
    majority_sign_method: str = parameter(MAJORITY_SIGN_METHOD)
    """``total`` or ``frequency``."""


def drop_and_rescale_(chunk: MergeChunk, densities: tuple[float, ...]) -> Stack:
    """Drop entries at random and divide the rest by the density, in place."""
    for source, (row, density) in enumerate(zip(chunk.vectors.rows, densities, strict=True)):
        chunk.masks.drop_(row, source=source, density=density)
        if 0 < density < 1:
            divide_(row, density)
    return chunk.vectors


def dare_linear(chunk: MergeChunk, params: DareLinearParams) -> Tensor:
    """Return ``base + sum_i w_i drop(x_i - base) / density_i``."""
    dropped = drop_and_rescale_(chunk, params.density)
    return chunk.base_plus(sum_rows(weigh_(dropped, params.weight), chunk.scratch[0]))


def dare_ties(chunk: MergeChunk, params: DareTiesParams) -> Tensor:
    """Return ``base + disjoint mean of w_i drop(x_i - base) / density_i``."""
    dropped = drop_and_rescale_(chunk, params.density)
    elected = elect_sign(dropped, SignVote(params.majority_sign_method), chunk.scratch[:2])
    return chunk.base_plus(disjoint_mean(dropped, params.weight, elected, chunk.scratch[1:]))


def _sweep_linear(params: DareLinearParams) -> Sweep:
    return Sweep(Combine.SUM, params.weight, Keep.RANDOM, params.density)


def _sweep_ties(params: DareTiesParams) -> Sweep:
    combine = combine_majority(params.majority_sign_method)
    return Sweep(combine, params.weight, Keep.RANDOM, params.density)


METHODS = (
    MergeMethod(
        name="dare_linear",
        summary="Drops entries of the task vectors at random, rescales, adds.",
        reference="Yu et al. 2024, arXiv:2311.03099",
        params=DareLinearParams,
        operand=Operand.TASK_VECTORS,
        locality=Locality.ELEMENT,
        reduction=lambda _: None,
        apply=dare_linear,
        scratch_rows=1,
        sweep=_sweep_linear,
        random=True,
        examples=(
            {"density": 0.5},
            {"density": (0.2, 1.0), "weight": (0.5, -1.0)},
            {"density": 0.0},
            {"density": 1.0},
        ),
        waived={Law.ORDER: "masks are drawn for a source by its place in the recipe"},
    ),
    MergeMethod(
        name="dare_ties",
        summary="Drops entries at random, rescales, elects a sign, averages what agrees.",
        reference="Yu et al. 2024, arXiv:2311.03099",
        params=DareTiesParams,
        operand=Operand.TASK_VECTORS,
        locality=Locality.ELEMENT,
        reduction=lambda _: None,
        apply=dare_ties,
        scratch_rows=3,
        sweep=_sweep_ties,
        random=True,
        examples=(
            {"density": 0.5},
            {"density": (0.2, 0.9), "weight": (0.6, 0.4), "majority_sign_method": "frequency"},
            {"density": 0.0},
            {"density": 1.0},
        ),
        waived={
            Law.NEGATION: "an exactly balanced vote elects + whatever the signs",
            Law.ORDER: "masks are drawn for a source by its place in the recipe",
        },
    ),
)
