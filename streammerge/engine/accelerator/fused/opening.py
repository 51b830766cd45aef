"""Whether fused kernels can be had, without loading a compiler that is not there."""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import TYPE_CHECKING

from streammerge.lazily import torch

if TYPE_CHECKING:
    from streammerge.engine.accelerator.fused.running import FusedSteps
    from streammerge.engine.accelerator.ring import Ring
    from streammerge.plan.types import MergePlan


def open_fused(plan: MergePlan, ring: Ring, tile: int) -> FusedSteps:
    """Return what runs fused kernels in a ring's memory.

    Args:
        plan: The plan.
        ring: The worker's memory.
        tile: Elements per instance of a kernel.
    """
    # Triton takes half a second to load, which merges on the CPU need not wait for.
    from streammerge.engine.accelerator.fused.running import FusedSteps  # noqa: PLC0415

    return FusedSteps(plan, ring, tile)


@cache
def why_not_fused(device: torch.device) -> str | None:
    """Return why no kernel can be compiled for a device; None if one was, and computed what it should.

    Triton needs a C compiler where it runs, and knows devices from some generation on: trying says more
    than asking.
    """
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    try:
        from streammerge.engine.accelerator.fused.kernels import try_kernel  # noqa: PLC0415

        return try_kernel(device)
    except Exception as error:  # noqa: BLE001 - whatever a compiler may raise, there are no kernels
        return f"Triton cannot compile for it: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
