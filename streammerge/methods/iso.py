"""Isotropic merging: all singular values of the summed task matrices made equal.

Source: Marczak et al. 2025, "No task left behind", arXiv:2502.04959. ``iso_c`` merges in the common
space, that of the sum; ``iso_cts`` replaces the least of its directions by the first that each task has
outside of it. Tensors that are no matrices are averaged, as in the authors' code.
Differs from the code: directions that are zero up to rounding are left out, of the mean too; where its
rounding would take more directions for the tasks than there are, they take as many as fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from streammerge.lazily import torch
from streammerge.methods.base import MergeMethod, Operand, Work, parameter
from streammerge.methods.families import LAMBDA, times
from streammerge.methods.matrices import (
    added_up,
    decompose,
    largest_value,
    nearest_orthogonal,
)
from streammerge.recipe.types import ParameterKind, ParameterSpec
from streammerge.tiles.writing import Row, Sheet

if TYPE_CHECKING:
    from torch import Tensor

COMMON_SPACE_FRACTION = ParameterSpec(
    name="common_space_fraction",
    kind=ParameterKind.FLOAT,
    doc="Fraction of the directions that is common, in [0, 1]; the tasks give the rest.",
    default=0.8,
    per_source=False,
    minimum=0.0,
    maximum=1.0,
)


@dataclass(frozen=True, slots=True)
class IsoCParams:
    """Parameters of ``iso_c``."""

    lambda_: float = parameter(LAMBDA)
    """Factor of the whole change."""


@dataclass(frozen=True, slots=True)
class IsoCtsParams:
    """Parameters of ``iso_cts``."""

    common_space_fraction: float = parameter(COMMON_SPACE_FRACTION)
    """Fraction of the directions that is common, in [0, 1]."""
    lambda_: float = parameter(LAMBDA)
    """Factor of the whole change."""


def iso_c(params: IsoCParams) -> Work:
    """Return ``base + lambda mean(S) U V`` of the singular value decomposition of the sum."""

    def merge(sheet: Sheet) -> Row:
        return sheet.base + times(sheet.computed(0), params.lambda_)

    return Work(merge, whole=_equalise, decomposes=True)


def iso_cts(params: IsoCtsParams) -> Work:
    """Return the same with the tasks' own directions in place of the least common ones."""

    def merge(sheet: Sheet) -> Row:
        return sheet.base + times(sheet.computed(0), params.lambda_)

    return Work(
        merge, whole=lambda vectors: _join(vectors, params.common_space_fraction), decomposes=True
    )


def _equalise(vectors: Sequence[Tensor]) -> Tensor:
    total = added_up(vectors)
    if total.dim() != 2:
        return total / len(vectors)
    factors = decompose(total, min(total.shape))
    if not factors.values.numel():
        return torch.zeros_like(total)
    return factors.values.mean() * (factors.left @ factors.right)


def _join(vectors: Sequence[Tensor], fraction: float) -> Tensor:
    total = added_up(vectors)
    if total.dim() != 2:
        return total / len(vectors)
    common, each = count_directions(min(total.shape), len(vectors), fraction)
    shared = decompose(total, common)
    del total
    parts = []
    for vector in vectors:
        wide = vector.double()
        scale = largest_value(wide)
        # What projection leaves of nothing is rounding, small beside the task vector itself.
        parts.append(decompose(wide - shared.left @ (shared.left.T @ wide), each, beside=scale))
    parts.append(shared)
    values = torch.cat([part.values for part in parts])
    if not values.numel():
        return torch.zeros_like(vectors[0], dtype=torch.float64)
    left = nearest_orthogonal(torch.cat([part.left for part in parts], dim=1))
    right = nearest_orthogonal(torch.cat([part.right for part in parts], dim=0))
    return values.mean() * (left @ right)


def count_directions(directions: int, tasks: int, fraction: float) -> tuple[int, int]:
    """Return how many directions are common, and how many each task adds; together all."""
    wanted = directions - int(directions * fraction)
    each = min(round(wanted / tasks), directions // tasks)
    return directions - each * tasks, each


METHODS = (
    MergeMethod(
        name="iso_c",
        summary="All singular values of the summed task matrices made equal.",
        reference="Marczak et al. 2025, arXiv:2502.04959",
        params=IsoCParams,
        operand=Operand.TASK_VECTORS,
        work=iso_c,
        examples=({}, {"lambda": 0.5}),
    ),
    MergeMethod(
        name="iso_cts",
        summary="The same, with directions of single tasks in place of the least common ones.",
        reference="Marczak et al. 2025, arXiv:2502.04959",
        params=IsoCtsParams,
        operand=Operand.TASK_VECTORS,
        work=iso_cts,
        examples=({}, {"common_space_fraction": 0.5, "lambda": 0.5}),
    ),
)
