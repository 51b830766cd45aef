"""Where one matrix after the other is factored: on the CPU, or on accelerators.

Memory: for each thread what :func:`streammerge.extracting.factoring.workspace` says of a matrix on the CPU,
and :func:`streammerge.extracting.devices.host_bytes` of one for a device, which has
:func:`~streammerge.extracting.devices.device_bytes` of its own memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streammerge.adapters.combining.plans import OutputTensor
from streammerge.checkpoint.bytesource import ByteSource
from streammerge.checkpoint.outputfile import OutputFile
from streammerge.engine.accelerator import opening
from streammerge.engine.accelerator.backend import Backend
from streammerge.engine.accelerator.cuda import full_products
from streammerge.engine.accelerator.matrices import MatrixBenches, MatrixWork
from streammerge.engine.buffers import allocate
from streammerge.engine.memory import release_free_memory
from streammerge.engine.monitor import Monitor
from streammerge.engine.pieces import torch_dtype
from streammerge.errors import NonFiniteError, printable
from streammerge.extracting.devices import device_bytes, is_for_device
from streammerge.extracting.factoring import draw_projection, factor_with, relative_error
from streammerge.extracting.plans import FactorTask
from streammerge.extracting.reading import read_difference
from streammerge.rng import stream_key

_THEN = "extract again"
_LINE = 64
"""Bytes of a cache line, to which torch aligns what it allocates itself."""


@contextmanager
def open_bench(names: Sequence[str]) -> Iterator[FactorBench]:
    """Open the devices of a plan; none for the CPU.

    Raises:
        DeviceError: One is not there.
        DeviceLostError: One does not answer.
    """
    with full_products():
        yield FactorBench(opening.open_devices(names))


class FactorBench:
    """Factors matrices, each from both models to its place in the file; thread-safe."""

    def __init__(self, backends: Sequence[Backend]) -> None:
        """Share devices; none for the CPU."""
        self._backends = backends
        self._benches = MatrixBenches(backends, Monitor(), _THEN) if backends else None

    @property
    def device_peak(self) -> int:
        """Most memory that the process had of any one device, in bytes."""
        return max((backend.peak_bytes() for backend in self._backends), default=0)

    def factor(self, sources: Sequence[ByteSource], output: OutputFile, task: FactorTask) -> float:
        """Write the factors of one matrix; return what is missing of its norm.

        Raises:
            NonFiniteError: A difference, or a factor in its type, is not finite.
            DeviceLostError: The device has failed.
            MemoryBudgetError: Its memory has run out twice.
        """
        try:
            with torch.inference_mode():
                return self._factor(sources, output, task)
        finally:
            # What a matrix took lies in the heaps of threads, in pieces that the next one does not fit.
            release_free_memory()

    def _factor(self, sources: Sequence[ByteSource], output: OutputFile, task: FactorTask) -> float:
        difference = _allocate_aligned(task.pair.base.numel * 4)
        read_difference(sources, task.pair, torch.from_numpy(difference.view(np.float32)))
        given = [difference]
        if not task.exact:
            given.append(_draw(task))
        made = [_allocate_aligned(place.nbytes) for place in (task.down, task.up)]
        if self._benches is None or not is_for_device(task):
            error, largest = _factor_there(
                task, *([torch.from_numpy(each) for each in some] for some in (given, made))
            )
        else:
            error, largest = self._benches.run(
                MatrixWork(
                    name=task.pair.name,
                    nbytes=device_bytes(task),
                    given=given,
                    made=made,
                    compute=lambda there, back: _factor_there(task, there, back),
                )
            )
        for place, content, reached in zip((task.down, task.up), made, largest, strict=True):
            _write(output, place, content, reached, task.pair.name)
        return error


def _allocate_aligned(nbytes: int) -> NDArray[np.uint8]:
    """Return memory that begins with a cache line, which decides last bits of products on the CPU."""
    room = allocate(nbytes + _LINE)
    begin = -room.ctypes.data % _LINE
    return room[begin : begin + nbytes]


def _draw(task: FactorTask) -> NDArray[np.uint8]:
    """Return the projection of a matrix, as bytes."""
    shape = task.up.shape[0], task.down.shape[1]
    seed = stream_key(0, 0, task.pair.name) & (2**63 - 1)
    return draw_projection(shape, task.rank, seed).reshape(-1).view(np.uint8)


def _factor_there(
    task: FactorTask, given: Sequence[Tensor], made: Sequence[Tensor]
) -> tuple[float, tuple[float, float]]:
    """Factor a matrix where it lies.

    Args:
        task: The matrix.
        given: The difference and, unless all singular values are to be found, the projection, as bytes.
        made: Receives both factors in their type, as bytes.

    Returns:
        What is missing of the norm, and the largest magnitude in each factor before it is rounded.
    """
    matrix = given[0].view(torch.float32).view(task.pair.shape)
    matrix = matrix.T if task.transposed else matrix
    projection = None if task.exact else given[1].view(torch.float32).view(matrix.shape[1], -1)
    found = factor_with(matrix, task.rank, projection)
    stored = [
        memory.view(torch_dtype(place.dtype)).view(place.shape)
        for memory, place in zip(made, (task.down, task.up), strict=True)
    ]
    largest = float(found.down.abs().max()), float(found.up.abs().max())
    stored[0].copy_(found.down)
    stored[1].copy_(found.up)
    del found
    return relative_error(matrix, *stored), largest


def _write(
    output: OutputFile, place: OutputTensor, content: NDArray[np.uint8], reached: float, name: str
) -> None:
    """Write a factor, which is in its type."""
    rounded = torch.from_numpy(content).view(torch_dtype(place.dtype))
    if not bool(torch.isfinite(rounded).all()):
        raise NonFiniteError(
            f"{printable(name)}: a factor reaches {reached:g}, beyond the range of {place.dtype}; choose "
            "a wider --dtype"
        )
    output.write_at(place.offset, content.data)
