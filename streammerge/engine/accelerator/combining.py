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
from streammerge.errors import DeviceError, MemoryBudgetError
from streammerge.lazily import torch
from streammerge.plan.device_matrices import (
    HOST_BYTES,
    allow_matrix,
    decomposing_bytes,
    goes_to_device,
)
from streammerge.plan.devices import HOST_GROWTH_BYTES
from streammerge.recipe.types import ComputeDType
from streammerge.units import BASELINE_NOISE, format_budget, format_size

if TYPE_CHECKING:
    from torch import Tensor

_THEN = "combine again"

Decompose = Callable[["Tensor", int, str], tuple["Tensor", "Tensor"]]
"""Returns A ``[rank, in]`` and B ``[out, rank]`` of a matrix ``[out, in]``, given its name for messages."""
Factoring = Callable[["Tensor", int], tuple["Tensor", "Tensor"]]
"""The same of a matrix where it lies."""


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
    itemsize = 4 if plan.compute_dtype is ComputeDType.FLOAT32 else 8
    sizes = {task: _device_bytes(*_shape(task), task.rank, itemsize) for task in there}
    largest = max(there, key=sizes.__getitem__, default=None)
    peak = 0 if largest is None else sizes[largest]
    name = "" if largest is None else f"{largest.weight_name} {list(_shape(largest))}"
    allowed = allow_matrix(name, peak, names, budget=budget, free=free)
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


def _device_bytes(rows: int, columns: int, rank: int, itemsize: int) -> int:
    """Return the memory of a device for a product: itself, its factors, and the decomposition."""
    kept = rows * columns + rank * (rows + columns)
    return itemsize * kept + decomposing_bytes(rows * columns, itemsize)


@dataclass(frozen=True, slots=True)
class Decomposer:
    """Decomposes products on devices, or where they are."""

    decompose: Decompose
    """See there."""
    peak_bytes: Callable[[], int]
    """Returns the most memory that the process had of any one device."""


@contextmanager
def open_decomposer(plan: CombinationPlan) -> Iterator[Decomposer]:
    """Open the devices of a plan; without any, everything is decomposed on the CPU.

    Raises:
        DeviceError: A device is not there.
        DeviceLostError: One does not answer.
    """
    # It loads torch, as a combination does, and plans need not.
    from streammerge.adapters.combining.factors import decompose as on_cpu  # noqa: PLC0415

    if plan.device is None:
        yield Decomposer(lambda product, rank, _: on_cpu(product, rank), lambda: 0)
        return
    backends = opening.open_devices(plan.device.names)
    benches = MatrixBenches(backends, Monitor(), _THEN)

    def decompose(product: Tensor, rank: int, name: str) -> tuple[Tensor, Tensor]:
        if not goes_to_device(product.shape):
            return on_cpu(product, rank)
        return _decompose_there(benches, product, rank, name, on_cpu)

    with full_products():
        yield Decomposer(decompose, lambda: max(each.peak_bytes() for each in backends))


def _decompose_there(
    benches: MatrixBenches, product: Tensor, rank: int, name: str, by: Factoring
) -> tuple[Tensor, Tensor]:
    """Return what the same function returns on the CPU, but for last bits."""
    rows, columns = product.shape
    dtype, size = product.dtype, product.element_size()
    shapes = (rank, columns), (rows, rank)
    made = [allocate(height * width * size) for height, width in shapes]

    def views(memories: Sequence[Tensor]) -> list[Tensor]:
        pairs = zip(memories, shapes, strict=True)
        return [memory.view(dtype).view(shape) for memory, shape in pairs]

    def compute(given: Sequence[Tensor], back: Sequence[Tensor]) -> None:
        factors = by(given[0].view(dtype).view(rows, columns), rank)
        for place, factor in zip(views(back), factors, strict=True):
            place.copy_(factor)

    benches.run(
        MatrixWork(
            name=name,
            nbytes=_device_bytes(rows, columns, rank, size),
            given=[product.contiguous().view(-1).view(torch.uint8).numpy()],
            made=made,
            compute=compute,
        )
    )
    down, up = views([torch.from_numpy(np.asarray(memory)) for memory in made])
    return down, up
