"""Small tensors that are merged as those of a plan are, to try what is done with them.

Memory: what is drawn of an adapter's factors, for as many rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import prod
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from streammerge.adapters.onto_base.changes import Change, ChangeKind
from streammerge.adapters.onto_base.deltas import Delta
from streammerge.dtypes import DType
from streammerge.engine.pieces import torch_dtype
from streammerge.lazily import torch
from streammerge.plan.types import TensorTask

MadeT = TypeVar("MadeT")
_MATRICES = 2
"""Of a stack, however many it has."""
_LEAST_ROWS = 4
"""Of a matrix that has too many columns."""


def shrink_task(task: TensorTask, most: int) -> TensorTask:
    """Return a tensor with some rows of another one, and some columns, if it has very many.

    Args:
        task: The tensor, to which adapters add products, if they change it.
        most: Elements that are enough, and fewer only where it has no more itself; there may be up to half as
            many more, or a row that is seen whole.
    """
    columns = task.changes[0].matrix[1] if task.changes else task.row or 1
    unit = columns
    if task.changes:
        # Enough that few rows have as many elements; of rows that are seen whole all, or some.
        enough = max(most // _LEAST_ROWS, -(-most // (task.numel // columns)))
        unit = min(columns, max(-(-enough // (task.row or 1)), 1) * (task.row or 1))
    rows = -(-min(task.numel // columns * unit, most) // unit)
    if any(change.is_stack for change in task.changes):
        rows = -(-rows // _MATRICES) * _MATRICES
    changes = tuple(
        _shrink_change(each, (rows, unit), task.numel // columns) for each in task.changes
    )
    shape = (rows, unit) if task.changes or task.row else (rows,)
    return replace(
        task,
        shape=shape,
        numel=prod(shape),
        scope_block=0,
        region=None,
        encoding=None,
        changes=changes,
    )


def _shrink_change(change: Change, shape: tuple[int, int], of_rows: int) -> Change:
    """Return the change of a smaller matrix.

    Args:
        change: The change.
        shape: Rows and columns of the tensor that is left.
        of_rows: Rows that it had.
    """
    down, up, *magnitude = change.factors
    rows, columns = shape
    # One of many experts has a part of the factors, and needs no others.
    window, experts = change.window, 1
    if window is not None:
        # In the same place, as far as there is one.
        first, end = (each // change.matrix[1] * rows // of_rows for each in window)
        end = max(end, first + 1)
        window, rows = (first * columns, end * columns), end - first
    elif change.is_stack:
        experts, rows = _MATRICES, rows // _MATRICES
    outer, inner = (columns, rows) if change.transposed else (rows, columns)
    factors = (
        replace(down, shape=(experts * change.rank, inner)),
        replace(up, shape=(outer, experts * change.rank)),
        *(replace(each, shape=(rows if change.along_rows else columns,)) for each in magnitude),
    )
    return replace(
        change,
        matrix=(rows, columns),
        first_row=0,
        factors=factors,
        window=window,
        experts=experts,
        expert=None,
    )


def draw_factors(
    change: Change, generator: np.random.Generator, *, scale: float = 1.0
) -> list[NDArray[np.float32]]:
    """Return the factors of a product, and DoRA's magnitude, with elements drawn at random.

    Args:
        change: What they belong to.
        generator: Draws.
        scale: Size of their elements.
    """
    factors = [generator.standard_normal(each.shape, np.float32) for each in change.factors]
    for factor in factors:
        np.multiply(factor, scale, out=factor)
    return factors


def delta_of(
    change: Change, factors: Sequence[NDArray[np.float32]], dtype: DType = DType.F32
) -> Delta:
    """Return what drawn factors do to a tensor; what DoRA divides by is any number here.

    Args:
        change: What they belong to.
        factors: The factors.
        dtype: The compute dtype.
    """
    tensors = [torch.from_numpy(factor).to(torch_dtype(dtype)) for factor in factors]
    if change.kind is not ChangeKind.NORMED:
        return Delta(change, tensors)
    return Delta(change, tensors, tensors[-1].flatten().square() + 0.5)


def by_model(
    changes: Sequence[Change], models: int, made: Iterable[MadeT]
) -> tuple[tuple[MadeT, ...], ...]:
    """Sort what was made of each change by its model; nothing at all without changes."""
    found: list[list[MadeT]] = [[] for _ in range(models if changes else 0)]
    for change, each in zip(changes, made, strict=True):
        found[change.model].append(each)
    return tuple(map(tuple, found))
