"""What the adapters' tensors cost in memory while the tensors that they change are merged."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from streammerge.adapters.changes import WHOLE_NORM_NUMEL, Change, ChangeKind
from streammerge.plan.types import TensorTask
from streammerge.reductions import BLOCK

FactorKey = tuple[int, int]
"""A tensor of an adapter: index of its file in the plan, and first byte."""
NormKey = tuple[int, int, str]
"""The norms that belong to a DoRA magnitude, which is a :data:`FactorKey` before the word."""
_NORM_WORK = 12 * BLOCK
"""Elements of the temporary arrays with which norms are computed, a block of rows at a time."""


def factor_needs(task: TensorTask, itemsize: int) -> dict[FactorKey | NormKey, int]:
    """Return what must be in memory to change a tensor, with the bytes of each.

    Args:
        task: The tensor.
        itemsize: Bytes per element in the compute dtype, which factors are kept in.
    """
    needs: dict[FactorKey | NormKey, int] = {}
    for change in task.changes:
        for factor in change.factors:
            needs[factor.file, factor.offset] = factor.numel * itemsize
        if change.kind is ChangeKind.NORMED:
            rows, columns = change.matrix
            whole = 0 if change.along_rows else min(rows * columns, WHOLE_NORM_NUMEL)
            # The tensor twice, in parts and put together.
            needs[norm_key(change)] = (_NORM_WORK + rows + 8 * columns + 2 * whole) * itemsize
    return needs


def norm_key(change: Change) -> NormKey:
    """Return what the norms of a DoRA change are called."""
    magnitude = change.factors[-1]
    return magnitude.file, magnitude.offset, "norms"


def factors_nbytes(task: TensorTask, itemsize: int) -> int:
    """Return the bytes that must be in memory to change a tensor."""
    return sum(factor_needs(task, itemsize).values()) if task.changes else 0


def stored_nbytes(tasks: Iterable[TensorTask]) -> int:
    """Return the bytes that the factors take in their files, each counted once."""
    return sum({key: size for task in tasks for key, size in _stored(task)}.values())


def norms_nbytes(task: TensorTask) -> int:
    """Return the bytes of the base that are read beforehand, for DoRA's norms."""
    base = task.inputs[0]
    if base is None:
        return 0
    normed = sum(change.kind is ChangeKind.NORMED for change in task.changes)
    return normed * task.numel * base.dtype.itemsize


def _stored(task: TensorTask) -> Iterator[tuple[FactorKey, int]]:
    for change in task.changes:
        for factor in change.factors:
            yield (factor.file, factor.offset), factor.nbytes
