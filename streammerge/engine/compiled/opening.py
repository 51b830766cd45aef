"""Whether the compiled kernels can serve a plan."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from streammerge.dtypes import DType
from streammerge.engine.compiled.measuring import CompiledMeasuring
from streammerge.engine.compiled.merging import VECTOR_COLUMNS, CompiledMerging
from streammerge.methods.base import MergeMethod
from streammerge.methods.parts import ADD_LEFT_TO_RIGHT
from streammerge.native.library import SOURCES_AT_MOST, count_scratch, load_kernels
from streammerge.plan.types import MergePlan
from streammerge.reductions import BLOCK

assert count_scratch(SOURCES_AT_MOST) <= BLOCK  # noqa: S101 - a row of scratch memory must do


@dataclass(frozen=True, slots=True)
class Compiled:
    """The compiled way for one worker."""

    merging: CompiledMerging
    """For pass 2."""
    measuring: CompiledMeasuring
    """For pass 1."""


def open_compiled(plan: MergePlan, method: MergeMethod, memory: Tensor) -> Compiled | None:
    """Return the compiled way for a plan; None where there is none.

    Args:
        plan: The plan.
        method: Its method.
        memory: ``[BLOCK]`` in the compute dtype, scratch of one worker.
    """
    kernels = load_kernels()
    count = len(plan.models) - plan.has_base
    if kernels is None or plan.keep_non_finite or plan.compute_dtype is not DType.F32:
        return None
    if not 0 < count <= SOURCES_AT_MOST:
        return None
    if count > ADD_LEFT_TO_RIGHT and not _torch_adds_left_to_right(count):
        return None
    return Compiled(
        CompiledMerging(kernels, plan, method, memory), CompiledMeasuring(kernels, method, memory)
    )


def _torch_adds_left_to_right(rows: int) -> bool:
    """Return whether this torch adds so many rows as the kernels do, in columns taken as vectors."""
    columns = 2 * VECTOR_COLUMNS
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(rows, columns, generator=generator)
    added = values[0].clone()
    for row in values[1:]:
        added += row
    apart = torch.empty(rows, BLOCK)[:, :columns].copy_(values)
    return torch.equal(values.sum(dim=0), added) and torch.equal(apart.sum(dim=0), added)
