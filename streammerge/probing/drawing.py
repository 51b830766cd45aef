"""Small tensors like those of a plan, with numbers drawn at random, to see how long their work takes.

Memory: two blocks per model, or half as much again, and what an adapter's factors have for as many rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streammerge.adapters.onto_base.changes import Change
from streammerge.adapters.onto_base.products import PlainProduct
from streammerge.dtypes import DType
from streammerge.engine.pieces import Part, PieceInMemory, Stored
from streammerge.engine.small import by_model, delta_of, draw_factors, shrink_task
from streammerge.floats import narrow
from streammerge.plan.types import TensorTask
from streammerge.statistics import BLOCK

DRAWN_NUMEL = 2 * BLOCK
"""Enough that the calls take no time beside the work; drawn in ten milliseconds per model."""
_FACTORS = 0.01
"""Size of elements of adapters' factors, whose products are changes, too."""
_DRAWN = 4
"""Sources that differ; further ones are copies of them, for to draw takes longer than to merge."""


def draw_piece(task: TensorTask, compute_dtype: DType, *, by_torch: bool) -> PieceInMemory:
    """Return a tensor of two blocks, or of rows that are about that, to be merged as a larger one is.

    Args:
        task: The tensor, whose rows have at most :data:`DRAWN_NUMEL` elements, if they are seen whole, and to
            which adapters add products, if they change it.
        compute_dtype: F32 or F64.
        by_torch: Whether the plan changes tensors by torch.
    """
    generator = np.random.default_rng(0)
    small = shrink_task(task, DRAWN_NUMEL)
    make = partial(delta_of, dtype=compute_dtype) if by_torch else _make_plain
    drawn = (
        make(change, draw_factors(change, generator, scale=_FACTORS)) for change in small.changes
    )
    deltas: tuple[tuple[Any, ...], ...] = by_model(small.changes, len(small.inputs), drawn)
    part = Part(small, 0, 0, small.numel)
    return PieceInMemory((part,), tuple(_draw_models(small, generator)), deltas)


def _make_plain(change: Change, factors: Sequence[NDArray[np.float32]]) -> PlainProduct:
    """Do so without torch; the order within tiles is that of other numbers drawn at random."""
    down, up = factors
    return PlainProduct(down.reshape(-1), up, change.matrix[1], change.scaling)


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
