"""Tensors whose shapes differ along one dimension: what all have is merged, the rest is one model's.

A vocabulary padded to another size, the channels of a model that paints over a mask: along the
dimension that differs, the part up to the smallest size is a tensor of its own in every model, and so
is the rest of the largest one. Both are views; nothing is copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from streammerge.assignment.types import Region
from streammerge.checkpoint.types import TensorEntry
from streammerge.checkpoint.views import joined, sliced

Shape = tuple[int, ...]


def differing_axis(shapes: Sequence[Shape]) -> int | None:
    """Return the one dimension along which shapes differ; None where they do in none or several."""
    if len({len(shape) for shape in shapes}) != 1:
        return None
    differing = [
        axis for axis, sizes in enumerate(zip(*shapes, strict=True)) if len(set(sizes)) > 1
    ]
    return differing[0] if len(differing) == 1 else None


def part_along(entry: TensorEntry, axis: int, begin: int, end: int) -> TensorEntry:
    """Return a range of indices along a dimension as a tensor.

    Args:
        entry: The tensor.
        axis: The dimension.
        begin: First index.
        end: End of the range.
    """
    size = entry.shape[axis]
    shape = (*entry.shape[:axis], end - begin, *entry.shape[axis + 1 :])
    if begin == 0 and end == size:
        return entry
    outer, inner = prod(entry.shape[:axis]), prod(entry.shape[axis + 1 :])
    run = ((end - begin) * inner,)
    slices = [
        sliced(entry, entry.name, (index * size + begin) * inner, run) for index in range(outer)
    ]
    return joined(entry.name, shape, slices) if slices else sliced(entry, entry.name, 0, shape)


def region_along(shape: Shape, axis: int, begin: int, end: int, *, leads: bool) -> Region:
    """Return where a range of indices along a dimension lies in the whole tensor."""
    inner = prod(shape[axis + 1 :])
    stride = shape[axis] * inner
    return Region(shape, leads, begin * inner, (end - begin) * inner, stride)
