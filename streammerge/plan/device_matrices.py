"""How much memory of an accelerator the decomposition of a whole matrix takes, and which ones go there.

A matrix goes to a device whole, so that no budget, chunk or number of workers decides how it is cut. The
parts, in bytes, for each device, which has one matrix at a time:

    given       sources · elements in the compute dtype, and as much as one of them for the result
    making      DECOMPOSING_MATRICES matrices of that size, in the dtype that is decomposed in
    libraries   what cuBLAS and cuSOLVER take whatever the matrix is, and rounded requests

Which matrices go there is decided by their shape alone. One that does not fit is refused: were it left to
the CPU, the device's free memory would decide some last bits of the result.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import prod

from streammerge.errors import MemoryBudgetError, printable
from streammerge.methods.base import Work
from streammerge.methods.programs import Programs
from streammerge.plan.budgeting import Demand, whole_bytes
from streammerge.plan.types import TensorTask
from streammerge.units import MIB, format_budget, format_size

LEAST_SIDE = 512
"""Of the smaller side: below it, a core takes less time than a device that is asked for many short
steps. An estimate, see docs/design/devices.md."""
MOST_NUMEL = 2**28
"""cuSOLVER counts its workspace, some matrices of that size, in 32 bits."""
DECOMPOSING_MATRICES = 24
"""What a method has of them at once: up to nine that are torch's, which the tests hold it to, and the
rest for cuSOLVER: copies in its order, and a workspace that only its queries tell. An estimate."""
LIBRARIES_BYTES = 96 * MIB
"""cuBLAS's workspace is 32 MiB on recent devices; handles and requests rounded up to 20 MiB are the rest.
An estimate."""
STAGE_BYTES = 4 * MIB
"""Page-locked memory through which a matrix goes; a power of two, to which torch rounds."""
STAGES = 2
"""One is copied while the other is filled, or emptied."""
HOST_BYTES = STAGES * STAGE_BYTES + 192 * MIB
"""What one device's decompositions take of the process: stages, and what the libraries keep there, an
estimate."""
_DECOMPOSED_ITEMSIZE = 8
"""Methods decompose in float64."""


@dataclass(frozen=True, slots=True)
class MatricesShape:
    """What is decomposed on devices, and what the largest of it takes."""

    count: int
    """Tensors."""
    nbytes: int
    """Most bytes of a device that one of them takes; 0 for none."""
    largest: str
    """That one's name and shape, for messages; empty for none."""


def goes_to_device(shape: Sequence[int]) -> bool:
    """Return whether a matrix of this shape is decomposed on an accelerator, if there is one."""
    return len(shape) == 2 and min(shape) >= LEAST_SIDE and prod(shape) <= MOST_NUMEL


def decomposed_on_device(task: TensorTask, work: Work) -> bool:
    """Return whether what a method makes of a whole tensor is made on an accelerator, if there is one."""
    return task.whole and work.decomposes and goes_to_device(task.shape)


def decomposing_bytes(numel: int, itemsize: int) -> int:
    """Return the memory of a device for decomposing a matrix that is there, everything else included.

    Args:
        numel: Elements.
        itemsize: Bytes per element that is decomposed.
    """
    return DECOMPOSING_MATRICES * itemsize * numel + LIBRARIES_BYTES


def matrix_bytes(sources: int, numel: int, itemsize: int) -> int:
    """Return the memory of a device for what a method makes of a tensor.

    Args:
        sources: Vectors that are brought there.
        numel: Elements of each.
        itemsize: Bytes per element, as they are brought, and as the result is taken back.
    """
    return (sources + 1) * itemsize * numel + decomposing_bytes(numel, _DECOMPOSED_ITEMSIZE)


def gathering_bytes(
    task: TensorTask, programs: Programs, itemsize: int, *, has_devices: bool
) -> int:
    """Return the host memory of a tensor that is gathered, of what is made of it, and of the making.

    Args:
        task: The tensor.
        programs: What is done with it.
        itemsize: Bytes per element in the compute dtype.
        has_devices: Whether there are accelerators, which may take over the making.
    """
    if has_devices and decomposed_on_device(task, programs.work):
        return (programs.sources + 1) * itemsize * task.numel
    return whole_bytes(programs.sources, task.numel, itemsize)


def with_matrices(
    demand: Demand, tasks: Sequence[TensorTask], programs: Sequence[Programs], *, count: int
) -> Demand:
    """Return a demand for which ``count`` devices decompose the matrices that are for them.

    One matrix is gathered while each device has another, and the CPU one that is not for them.
    """
    itemsize = demand.compute_itemsize
    if not shape_matrices(tasks, programs, itemsize).count:
        return demand
    whole = [task for task in tasks if task.whole]
    nbytes = {
        there: max(
            (
                gathering_bytes(task, programs[task.setting], itemsize, has_devices=True)
                for task in whole
                if decomposed_on_device(task, programs[task.setting].work) is there
            ),
            default=0,
        )
        for there in (True, False)
    }
    return replace(
        demand,
        whole_nbytes=max(nbytes.values()),
        whole_useful=(count + 1) * nbytes[True] + nbytes[False],
        device_growth=demand.device_growth + count * HOST_BYTES,
    )


def shape_matrices(
    tasks: Iterable[TensorTask], programs: Sequence[Programs], itemsize: int
) -> MatricesShape:
    """Return what of a merge is decomposed on devices.

    Args:
        tasks: The plan's tensors.
        programs: What the method does, for each of its settings.
        itemsize: Bytes per element in the compute dtype.
    """
    there = [
        (matrix_bytes(programs[task.setting].sources, task.numel, itemsize), task)
        for task in tasks
        if task.whole and decomposed_on_device(task, programs[task.setting].work)
    ]
    if not there:
        return MatricesShape(0, 0, "")
    nbytes, task = max(there, key=lambda each: each[0])
    return MatricesShape(len(there), nbytes, f"{task.name} {list(task.shape)}")


def told_matrix(shape: MatricesShape) -> str:
    """Return what a refusal says of the largest matrix; nothing without one."""
    if not shape.count:
        return ""
    return f", of which {format_size(shape.nbytes)} are to decompose {shape.largest}"


def allow_matrix(
    name: str, nbytes: int, names: Sequence[str], *, budget: int | None, free: int
) -> int:
    """Return the bytes that each device may give, if its largest matrix fits them.

    Args:
        name: Of that matrix, with its shape, for messages.
        nbytes: What it takes of a device; 0 without any.
        names: The devices.
        budget: Most bytes on each of them; None for what is free.
        free: Bytes that are free on the fullest of them.

    Raises:
        MemoryBudgetError: It does not; names the least memory that would do.
    """
    allowed = free if budget is None else min(budget, free)
    if nbytes <= allowed:
        return allowed
    limit = (
        f"only {format_size(free)} are free there"
        if nbytes > free
        else f"--device-memory is {format_size(allowed)}"
    )
    raise MemoryBudgetError(
        f"{printable(name)} takes {format_size(nbytes)} of {', '.join(names)} while it is decomposed, and "
        f"{limit}; give --device-memory {format_budget(nbytes)} or more, or --device cpu"
    )
