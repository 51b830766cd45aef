"""The stage of a worker on the CPU: with the compiled machine where it can serve."""

from __future__ import annotations

from streammerge.engine.compiled.stage import CompiledStage
from streammerge.engine.device import DeviceStage
from streammerge.engine.plain import PlainStage
from streammerge.methods.base import MergeMethod
from streammerge.native.library import load_kernels
from streammerge.plan.kernels import kernels_serve
from streammerge.plan.sweeps import programs_of_plan
from streammerge.plan.types import MergePlan
from streammerge.tiles.program import Op


def open_cpu_stage(plan: MergePlan, method: MergeMethod) -> DeviceStage:
    """Return the stage of one worker.

    Args:
        plan: The plan.
        method: Its method.
    """
    kernels = load_kernels() if kernels_serve(plan) else None
    programs = [program for one in programs_of_plan(plan, method) for program in one.all]
    if kernels is None or any(program.uses(Op.CHANGED) for program in programs):
        return PlainStage(plan, method)
    plain = PlainStage(plan, method) if plan.needs_torch else None
    return CompiledStage(kernels, plan, method, plain)
