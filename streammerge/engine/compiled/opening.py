"""The stage of a worker on the CPU: with the compiled kernels where they can serve."""

from __future__ import annotations

from streammerge.engine.compiled.stage import CompiledStage
from streammerge.engine.device import DeviceStage
from streammerge.engine.plain import PlainStage
from streammerge.lazily import torch
from streammerge.methods.base import MergeMethod
from streammerge.native.library import SOURCES_AT_MOST, count_scratch, load_kernels
from streammerge.plan.kernels import VECTOR_COLUMNS, kernels_serve, sums_are_known
from streammerge.plan.types import MergePlan
from streammerge.reductions import BLOCK

assert count_scratch(SOURCES_AT_MOST) <= BLOCK  # noqa: S101 - a row of scratch memory must do


def open_cpu_stage(plan: MergePlan, method: MergeMethod) -> DeviceStage:
    """Return the stage of one worker.

    Args:
        plan: The plan.
        method: Its method.
    """
    kernels = load_kernels() if kernels_serve(plan) else None
    count = len(plan.models) - plan.has_base
    if kernels is None or not (sums_are_known(count) or torch_adds_left_to_right(count)):
        return PlainStage(plan, method)
    plain = PlainStage(plan, method) if plan.needs_torch else None
    return CompiledStage(kernels, plan, method, plain)


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
