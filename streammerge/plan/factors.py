"""What the adapters' tensors cost in memory while the tensors that they change are merged."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from streammerge.adapters.onto_base.changes import WHOLE_NORM_NUMEL, Change, ChangeKind
from streammerge.adapters.onto_base.workings import working_numel
from streammerge.plan.types import TensorInput, TensorTask
from streammerge.statistics import BLOCK

FactorKey = tuple[int, int, int]
"""A tensor of an adapter: index of its file in the plan, first byte, and its place among the factors of a
change: the first of two lies in memory in another order than the second."""
NormKey = tuple[int, int, str]
"""What is made of a tensor of an adapter, of which there is the file and first byte before the words: the
norms that belong to a DoRA magnitude, or a working factor."""
_NORM_WORK = 12 * BLOCK
"""Elements of the temporary arrays with which norms are computed, a block of rows at a time."""
_TILED_NORM_WORK = 6 * BLOCK
"""The same where kernels add products, beside a factor in another order: two blocks of rows, what is read of
them, and the workspace of changes."""


def factor_needs(task: TensorTask, itemsize: int) -> dict[FactorKey | NormKey, int]:
    """Return what must be in memory to change a tensor, with the bytes of each.

    Args:
        task: The tensor.
        itemsize: Bytes per element in the compute dtype, which factors are kept in.
    """
    needs: dict[FactorKey | NormKey, int] = {}
    for change in task.changes:
        for place, factor in enumerate(change.factors):
            needs[factor_key(change, place)] = factor.numel * itemsize
        for index, working in enumerate(change.workings):
            if working.op.makes:
                numel = working_numel(working, change.factors)
                needs[working_key(change, index)] = numel * itemsize
        if change.kind is ChangeKind.NORMED:
            rows, columns = change.matrix
            whole = 0 if change.along_rows else min(rows * columns, WHOLE_NORM_NUMEL)
            tiles = change.factors[0].numel if change.adds_plain_product else 0
            work = max(_NORM_WORK, _TILED_NORM_WORK + tiles)
            # Sums in float64, in parts and put together; so the tensor, where norms of columns are PEFT's.
            needs[norm_key(change)] = (work + 8 * (rows + columns) + 2 * whole) * itemsize
    return needs


def factor_key(change: Change, place: int) -> FactorKey:
    """Return what a stored factor of a change is called."""
    factor = change.factors[place]
    return factor.file, factor.offset, place


def norm_key(change: Change) -> NormKey:
    """Return what the norms of a DoRA change are called."""
    magnitude = change.factors[-1]
    # One magnitude may belong to several tensors, each of which has some of its rows.
    # Several models may have the same adapter.
    what = f"norms {change.model} {change.first_row} {change.window}"
    return magnitude.file, magnitude.offset, what


def working_key(change: Change, index: int) -> NormKey:
    """Return what a factor that is made for a change is called.

    What is made of the same tensors is the same, unless the tensor that changes takes part.
    """
    working = change.workings[index]
    first = change.factors[working.parts[0]]
    what = f"{working.op} {working.rows} {working.columns}"
    if working.reads_base:
        what = f"{what} {working.numbers} {change.model} {change.window}"
    return first.file, first.offset, what


def factors_nbytes(task: TensorTask, itemsize: int) -> int:
    """Return the bytes that must be in memory to change a tensor."""
    return sum(factor_needs(task, itemsize).values()) if task.changes else 0


def stored_nbytes(tasks: Iterable[TensorTask]) -> int:
    """Return the bytes that the factors take in their files, each counted once."""
    return sum({key: size for task in tasks for key, size in _stored(task)}.values())


def changed_input(task: TensorTask, change: Change, *, in_turn: bool) -> TensorInput:
    """Return the stored tensor that a change is made to.

    Args:
        task: The tensor.
        change: One of its changes.
        in_turn: Whether sources are merged one after the other, where what the last adapter brings
            along takes the place of everybody's.
    """
    if in_turn:
        return next(entry for entry in reversed(task.inputs) if entry is not None)
    # What the adapter brings along, before the base's.
    entry = task.inputs[change.model] or task.inputs[0]
    assert entry is not None  # noqa: S101 - the planner gave every change something to change
    return entry


def norms_nbytes(task: TensorTask) -> int:
    """Return the bytes that are read beforehand, for DoRA's norms and what else the base is part of."""
    reading = [change for change in task.changes if change.reads_base]
    inputs = [changed_input(task, change, in_turn=False) for change in reading]
    return sum(entry.stored_nbytes(task.numel) for entry in inputs)


def _stored(task: TensorTask) -> Iterator[tuple[tuple[int, int], int]]:
    for change in task.changes:
        for factor in change.factors:
            yield (factor.file, factor.offset), factor.nbytes
