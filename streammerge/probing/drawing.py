"""Small tensors like those of a plan, with numbers drawn at random, to see how long their work takes.

Memory: two blocks per model, and what an adapter's factors have for as many rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streammerge.adapters.onto_base.changes import Change, ChangeKind
from streammerge.adapters.onto_base.deltas import Delta
from streammerge.adapters.onto_base.products import PlainProduct
from streammerge.dtypes import DType
from streammerge.engine.pieces import Part, PieceInMemory, Stored
from streammerge.floats import narrow
from streammerge.lazily import torch
from streammerge.plan.types import TensorTask
from streammerge.statistics import BLOCK

DRAWN_NUMEL = 2 * BLOCK
"""Enough that the calls take no time beside the work; drawn in ten milliseconds per model."""
_DRAWN = 4
"""Sources that differ; further ones are copies of them, for to draw takes longer than to merge."""


def unit_of(task: TensorTask) -> int:
    """Return the elements that a tensor is cut into: a row of what is seen by rows, or is a matrix to adapters."""
    if task.changes:
        return task.changes[0].matrix[1]
    return task.row or 1


def draw_piece(task: TensorTask, *, by_torch: bool) -> PieceInMemory:
    """Return a tensor of two blocks, or of whole rows that are at most that, to be merged as a larger one is.

    Args:
        task: The tensor, whose rows have at most :data:`DRAWN_NUMEL` elements, and to which adapters add
            plain products, if they change it.
        by_torch: Whether the plan changes tensors by torch.
    """
    generator = np.random.default_rng(0)
    small = _shrink(task)
    deltas: list[list[Any]] = [[] for _ in task.inputs]
    for change in small.changes:
        deltas[change.model].append(_draw_delta(change, generator, by_torch=by_torch))
    return PieceInMemory(
        (Part(small, 0, 0, small.numel),),
        tuple(_draw_models(small, generator)),
        tuple(map(tuple, deltas)) if small.changes else (),
    )


def _shrink(task: TensorTask) -> TensorTask:
    unit = unit_of(task)
    rows = min(task.numel, DRAWN_NUMEL) // unit
    shape = (rows, unit) if unit > 1 else (rows,)
    changes = tuple(_shrink_change(change, rows) for change in task.changes)
    return replace(
        task, shape=shape, numel=prod(shape), scope_block=0, region=None, changes=changes
    )


def _shrink_change(change: Change, rows: int) -> Change:
    down, up, *vectors = change.factors
    up = replace(up, shape=(rows, up.shape[1]))
    if change.along_rows:
        vectors = [replace(each, shape=(rows,)) for each in vectors]
    return replace(change, matrix=(rows, change.matrix[1]), factors=(down, up, *vectors))


def _draw_models(task: TensorTask, generator: np.random.Generator) -> Iterator[Stored | None]:
    """Yield models like fine-tunes of one: small changes of the first."""
    base = 0.02 * generator.standard_normal(task.numel)
    drawn: dict[tuple[int, DType], NDArray[np.uint8]] = {}
    for model, entry in enumerate(task.inputs):
        if entry is None:
            yield None
            continue
        which = (model if model < _DRAWN else 1 + model % (_DRAWN - 1), entry.dtype)
        if which not in drawn:
            change = 0.002 * generator.standard_normal(base.size) if model else 0.0
            drawn[which] = narrow(base + change, entry.dtype)
        # Memory of its own, for what is in the cache is read in no time.
        yield Stored(drawn[which].copy(), entry.dtype)


def _draw_delta(
    change: Change, generator: np.random.Generator, *, by_torch: bool
) -> Delta | PlainProduct:
    """Return what an adapter adds, in float32, and by which norms it divides then, if it does."""
    factors = [generator.standard_normal(each.shape, np.float32) for each in change.factors]
    for factor in factors:
        np.multiply(factor, 0.01, out=factor)
    down, up, *vectors = factors
    if not by_torch:
        # The order within tiles is that of other numbers drawn at random.
        return PlainProduct(down.reshape(-1), up, change.matrix[1], change.scaling)
    tensors = [torch.from_numpy(each) for each in (down, up, *vectors)]
    norms = torch.ones_like(tensors[-1].reshape(-1)) if change.kind is ChangeKind.NORMED else None
    return Delta(change, tensors, norms)
