"""Combinations of adapters that decompose whole products, on devices: which products, their memory, the work.

``ties_svd`` and the like make of every layer a matrix as large as the layer, and decompose it. That alone
goes to a device; trims, votes and masks before it are the CPU's, as is a product that is too small.

Memory: for each device what :func:`share_devices` has written into the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from streammerge.adapters.combining.combinations import COMBINATIONS, Target
from streammerge.adapters.combining.plans import CombinationPlan, DeviceShare, ModuleTask
from streammerge.engine.accelerator import opening
from streammerge.engine.accelerator.cuda import full_products
from streammerge.engine.accelerator.matrices import MatrixBenches, MatrixWork
from streammerge.engine.buffers import allocate
from streammerge.engine.monitor import Monitor
from streammerge.errors import DeviceError, MemoryBudgetError, printable
from streammerge.lazily import torch
from streammerge.methods.matrices import singular_parts
from streammerge.plan.device_matrices import HOST_BYTES, decomposing_bytes, goes_to_device
from streammerge.plan.devices import HOST_GROWTH_BYTES
from streammerge.recipe.types import ComputeDType
from streammerge.units import BASELINE_NOISE, format_budget, format_size

if TYPE_CHECKING:
    from torch import Tensor

_THEN = "combine again"

Decompose = Callable[["Tensor", int, str], tuple["Tensor", "Tensor"]]
"""Returns A ``[rank, in]`` and B ``[out, rank]`` of a matrix ``[out, in]``, given its name for messages."""
FixSigns = Callable[["Tensor", "Tensor"], tuple["Tensor", "Tensor"]]
"""Makes the factors those that are the same everywhere."""


def free_for(method: str, names: Sequence[str]) -> int:
    """Return the bytes that are free on the fullest of the devices; 0 without any.

    Raises:
        DeviceError: The combination has nothing for devices, or one is not there.
        DeviceLostError: One does not answer.
    """
    if names and COMBINATIONS[method].target is not Target.DENSE_PRODUCT:
        raise DeviceError(
            f"device: {','.join(names)!r}, but {method} of adapters is computed on the cpu, in seconds; leave "
            "it out"
        )
    # Opened before memory is looked at, for the driver takes some that no plan can foresee.
    return min((each.free_bytes() for each in opening.open_devices(names)), default=0)


def share_devices(
    plan: CombinationPlan, names: Sequence[str], *, budget: int | None, free: int
) -> CombinationPlan:
    """Return a plan with what its decompositions take of devices; without any, as it is.

    Args:
        plan: The plan for the CPU.
        names: The devices.
        budget: Most bytes on each of them; None takes what is needed.
        free: What :func:`free_for` returned.

    Raises:
        MemoryBudgetError: A product does not fit the devices, or what they take of the process not its budget.
    """
    if not names:
        return plan
    there = [task for task in plan.tasks if isinstance(task, ModuleTask) and _is_for_device(task)]
    peak = max((_device_bytes(plan, task) for task in there), default=0)
    allowed = free if budget is None else min(budget, free)
    if peak > allowed:
        largest = max(there, key=lambda task: _device_bytes(plan, task))
        limit = (
            f"only {format_size(free)} are free there"
            if peak > free
            else f"--device-memory is {format_size(allowed)}"
        )
        raise MemoryBudgetError(
            f"{printable(largest.weight_name)} {list(_shape(largest))} takes {format_size(peak)} of "
            f"{', '.join(names)} while it is decomposed, and {limit}; give --device-memory "
            f"{format_budget(peak)} or more, or --device cpu"
        )
    host = plan.peak_memory + len(names) * (HOST_GROWTH_BYTES + HOST_BYTES)
    if host > plan.budget:
        raise MemoryBudgetError(
            f"{plan.method} on {', '.join(names)} needs {format_size(host)} of the process, and --memory "
            f"allows {format_size(plan.budget)}; give --memory {format_budget(host + BASELINE_NOISE)} or "
            "more, or --device cpu"
        )
    share = DeviceShare(tuple(names), matrices=len(there), peak=peak, budget=allowed)
    return replace(plan, device=share, peak_memory=host)


def _shape(task: ModuleTask) -> tuple[int, int]:
    """Return the shape of a layer's product."""
    present = next(module for module in task.inputs if module is not None)
    return present.out_features, present.in_features


def _is_for_device(task: ModuleTask) -> bool:
    return task.copies is None and goes_to_device(_shape(task))


def _device_bytes(plan: CombinationPlan, task: ModuleTask) -> int:
    """Return the memory of a device for a product: itself, its factors, and the decomposition."""
    itemsize = 4 if plan.compute_dtype is ComputeDType.FLOAT32 else 8
    rows, columns = _shape(task)
    kept = rows * columns + task.rank * (rows + columns)
    return itemsize * kept + decomposing_bytes(rows * columns, itemsize)


@dataclass(frozen=True, slots=True)
class Decomposer:
    """Decomposes products on devices, or where they are."""

    decompose: Decompose
    """See there."""
    peak_bytes: Callable[[], int]
    """Returns the most memory that the process had of any one device."""


@contextmanager
def open_decomposer(
    plan: CombinationPlan, on_cpu: Callable[[Tensor, int], tuple[Tensor, Tensor]], fix: FixSigns
) -> Iterator[Decomposer]:
    """Open the devices of a plan; without any, everything is decomposed on the CPU.

    Args:
        plan: The plan.
        on_cpu: Decomposes a matrix of the host.
        fix: Fixes the signs of factors.

    Raises:
        DeviceError: A device is not there.
        DeviceLostError: One does not answer.
    """
    if plan.device is None:
        yield Decomposer(lambda product, rank, _: on_cpu(product, rank), lambda: 0)
        return
    backends = opening.open_devices(plan.device.names)
    benches = MatrixBenches(backends, Monitor(), _THEN)

    def decompose(product: Tensor, rank: int, name: str) -> tuple[Tensor, Tensor]:
        if not goes_to_device(product.shape):
            return on_cpu(product, rank)
        return _decompose_there(benches, product, rank, name, fix)

    with full_products():
        yield Decomposer(decompose, lambda: max(each.peak_bytes() for each in backends))


def _decompose_there(
    benches: MatrixBenches, product: Tensor, rank: int, name: str, fix: FixSigns
) -> tuple[Tensor, Tensor]:
    """Return what the CPU's decomposition returns, but for last bits."""
    rows, columns = product.shape
    dtype, size = product.dtype, product.element_size()
    shapes = (rank, columns), (rows, rank)
    made = [allocate(height * width * size) for height, width in shapes]

    def views(memories: Sequence[Tensor]) -> list[Tensor]:
        pairs = zip(memories, shapes, strict=True)
        return [memory.view(dtype).view(shape) for memory, shape in pairs]

    def compute(given: Sequence[Tensor], back: Sequence[Tensor]) -> None:
        left, values, right = singular_parts(given[0].view(dtype).view(rows, columns))
        down, up = fix(right[:rank].clone(), left[:, :rank] * values[:rank])
        for place, factor in zip(views(back), (down, up), strict=True):
            place.copy_(factor)

    nbytes = size * (rows * columns + rank * (rows + columns))
    benches.run(
        MatrixWork(
            name=name,
            nbytes=nbytes + decomposing_bytes(rows * columns, size),
            given=[product.contiguous().view(-1).view(torch.uint8).numpy()],
            made=made,
            compute=compute,
        )
    )
    down, up = views([torch.from_numpy(np.asarray(memory)) for memory in made])
    return down, up
