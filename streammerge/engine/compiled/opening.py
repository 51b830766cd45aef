"""The stage of a worker on the CPU: with the compiled kernels where they can serve."""

from __future__ import annotations

from streammerge.engine.compiled.stage import CompiledStage
from streammerge.engine.device import DeviceStage
from streammerge.engine.plain import PlainStage
from streammerge.lazily import torch
from streammerge.methods.base import MergeMethod
from streammerge.methods.parts import ADD_LEFT_TO_RIGHT
from streammerge.native.library import SOURCES_AT_MOST, count_scratch, load_kernels
from streammerge.plan.kernels import VECTOR_COLUMNS, kernels_serve, sums_are_known
from streammerge.plan.types import MergePlan
from streammerge.reductions import BLOCK

assert count_scratch(SOURCES_AT_MOST) <= BLOCK  # noqa: S101 - a row of scratch memory must do


def takes_torch(plan: MergePlan) -> bool:
    """Return whether workers and readers need torch."""
    # A plan may come from a machine where the kernels were compiled.
    return plan.needs_torch or load_kernels() is None


def open_cpu_stage(plan: MergePlan, method: MergeMethod) -> DeviceStage:
    """Return the stage of one worker.

    Args:
        plan: The plan.
        method: Its method.
    """
    kernels = load_kernels()
    count = len(plan.models) - plan.has_base
    serve = kernels_serve(
        count, compute_dtype=plan.compute_dtype, keep_non_finite=plan.keep_non_finite
    )
    if kernels is None or not serve or not _add_alike(count):
        return PlainStage(plan, method)
    plain = PlainStage(plan, method) if plan.needs_torch else None
    return CompiledStage(kernels, plan, method, plain)


def _add_alike(rows: int) -> bool:
    """Return whether torch adds so many rows as the kernels do, in columns taken as vectors."""
    return rows <= ADD_LEFT_TO_RIGHT or sums_are_known() or torch_adds_left_to_right(rows)


def torch_adds_left_to_right(rows: int) -> bool:
    """Let torch add so many rows, and return whether it does so from left to right."""
    columns = 2 * VECTOR_COLUMNS
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(rows, columns, generator=generator)
    added = values[0].clone()
    for row in values[1:]:
        added += row
    apart = torch.empty(rows, BLOCK)[:, :columns].copy_(values)
    return torch.equal(values.sum(dim=0), added) and torch.equal(apart.sum(dim=0), added)
