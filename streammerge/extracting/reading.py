"""Tensors of two models, whole or block by block.

Memory: two pieces of :data:`STEP` elements, as stored and in float32, while models are compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from streammerge.checkpoint.bytesource import ByteSource
from streammerge.checkpoint.types import TensorEntry
from streammerge.engine.pieces import torch_dtype
from streammerge.errors import NonFiniteError, printable
from streammerge.extracting.plans import Pair

STEP = 2**21
"""Elements that are compared, or saved, at once."""


def read_values(sources: Sequence[ByteSource], entry: TensorEntry, begin: int, end: int) -> Tensor:
    """Return some elements of a tensor as they are stored, ``[end - begin]``.

    Args:
        sources: The open files.
        entry: The tensor; its file, or those of its parts, are indices into them.
        begin: First flat index.
        end: End of the range.
    """
    itemsize = entry.dtype.itemsize
    memory = np.empty((end - begin) * itemsize, dtype=np.uint8)
    for file, offset, first, numel in _spans(entry):
        low, high = max(begin, first), min(end, first + numel)
        if low < high:
            place = memory.data[(low - begin) * itemsize : (high - begin) * itemsize]
            sources[file].read_into(offset + (low - first) * itemsize, place)
    return torch.from_numpy(memory).view(torch_dtype(entry.dtype))


def _spans(entry: TensorEntry) -> Iterator[tuple[int, int, int, int]]:
    """Yield file, offset, first element and number of elements of the parts of a tensor."""
    first = 0
    for part in entry.parts:
        yield part.file, part.offset, first, part.numel
        first += part.numel
    if not entry.parts:
        yield entry.file, entry.offset, 0, entry.numel


def read_difference(sources: Sequence[ByteSource], pair: Pair, out: Tensor) -> None:
    """Write tuned minus base into ``out``, ``[numel]`` in float32, rounded once.

    Raises:
        NonFiniteError: It holds NaN or infinity.
    """
    for begin in range(0, out.numel(), STEP):
        end = min(begin + STEP, out.numel())
        part = out[begin:end]
        part.copy_(read_values(sources, pair.tuned, begin, end))
        part.sub_(read_values(sources, pair.base, begin, end).to(torch.float32))
        if not bool(torch.isfinite(part).all()):
            bad = int(torch.isfinite(part).logical_not().nonzero()[0])
            raise NonFiniteError(
                f"{printable(pair.name)}: the difference is {float(part[bad])} at flat element "
                f"{begin + bad}; repair the models, which hold NaN or infinity there"
            )


def differs(sources: Sequence[ByteSource], pair: Pair) -> bool:
    """Return whether a tensor has other values in one model than in the other."""
    numel = pair.base.numel
    for begin in range(0, numel, STEP):
        end = min(begin + STEP, numel)
        one, other = (read_values(sources, entry, begin, end) for entry in (pair.base, pair.tuned))
        same = one.dtype == other.dtype and torch.equal(
            one.view(torch.uint8), other.view(torch.uint8)
        )
        if not same and not torch.equal(one.to(torch.float64), other.to(torch.float64)):
            return True
    return False
