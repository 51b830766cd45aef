"""Small tensors that stand for large ones: as large as is said, changed in the same way."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

import numpy as np
import pytest

from streammerge.adapters.onto_base.changes import Change, ChangeKind
from streammerge.assignment.types import Action
from streammerge.checkpoint.types import TensorEntry
from streammerge.dtypes import DType
from streammerge.engine.small import by_model, delta_of, draw_factors, shrink_task
from streammerge.plan.devices import TRIAL_NUMEL
from streammerge.plan.types import TensorTask
from streammerge.statistics import BLOCK

MOST = TRIAL_NUMEL


def task_of(shape: tuple[int, ...], *changes: Change, row: int = 0) -> TensorTask:
    return TensorTask(
        name="x",
        dtype=DType.F32,
        shape=shape,
        numel=prod(shape),
        action=Action.MERGE,
        inputs=(),
        setting=0,
        scope_block=0,
        shard=0,
        offset=0,
        changes=changes,
        row=row,
    )


def product(down: tuple[int, ...], up: tuple[int, ...], **more: Any) -> Change:
    rows = up[0] if "rows" not in more else more.pop("rows")
    columns = more.pop("columns", prod(down[1:]))
    vectors = [(rows,)] if more.get("kind") is ChangeKind.NORMED else []
    factors = (TensorEntry("x", DType.F32, shape, 0, 0) for shape in (down, up, *vectors))
    of_kind = {"kind": ChangeKind.LOW_RANK, "factors": tuple(factors), "matrix": (rows, columns)}
    return Change(**of_kind | more)


CHANGES = {
    "plain": ((4096, 1024), product((8, 1024), (4096, 8))),
    "small": ((40, 1024), product((8, 1024), (40, 8))),
    "wide": ((3, 5_000_000), product((2, 5_000_000), (3, 2))),
    "DoRA": ((4096, 1024), product((8, 1024), (4096, 8), kind=ChangeKind.NORMED)),
    "transposed": (
        (50_000, 512),
        product((8, 50_000), (512, 8), transposed=True, rows=50_000, columns=512),
    ),
    "convolution": ((1280, 640, 3, 3), product((4, 640, 3, 3), (1280, 4, 1, 1))),
    "half of a product": ((2048, 1024), product((8, 1024), (4096, 8), rows=2048, first_row=2048)),
    "one of a stack": ((512, 1024), product((8 * 6, 1024), (512, 8 * 6), experts=6, expert=4)),
    "stack": ((6, 512, 1024), product((8 * 6, 1024), (512, 8 * 6), experts=6)),
    "stack of many small ones": (
        (300, 3, 70_000),
        product((2 * 300, 70_000), (3, 600), experts=300),
    ),
    "rows": (
        (4096, 1024),
        product((8, 1024), (1000, 8), window=(3000 * 1024, 4000 * 1024)),
    ),
    "a row": ((4096, 1024), product((8, 1024), (1, 8), window=(4095 * 1024, 4096 * 1024))),
}


@pytest.mark.parametrize("case", CHANGES)
def test_what_changes_a_large_tensor_changes_a_small_one(case: str) -> None:
    shape, change = CHANGES[case]
    task = shrink_task(task_of(shape, change), MOST)

    (small,) = task.changes
    rows, columns = small.matrix
    assert task.numel <= min(1.5 * MOST, max(prod(shape), 2 * columns))
    assert prod(task.shape) == task.numel
    # More than a block, or no device would be asked for it.
    assert task.numel > BLOCK or task.numel == prod(shape)
    assert small.adds_product
    assert (small.product_kind, small.rank) == (change.product_kind, change.rank)
    assert small.transposed is change.transposed
    found = delta_of(small, draw_factors(small, np.random.default_rng(0))).product()
    assert found is not None
    assert (found.rows, found.rank, found.columns) == (rows, change.rank, columns)
    if small.window is not None:
        begin, end = small.window
        assert 0 <= begin < end <= task.numel
        assert end - begin == rows * columns
    else:
        assert rows * columns * (len(found.up) if small.is_placed else 1) == task.numel


def test_rows_that_are_seen_whole_stay_whole() -> None:
    assert shrink_task(task_of((900, 700), row=700), MOST).shape == (381, 700)
    assert shrink_task(task_of((900, 700)), MOST).shape == (MOST,)
    assert shrink_task(task_of((9, 7)), MOST).shape == (63,)


def test_what_was_made_is_sorted_by_model() -> None:
    changes = [replace(CHANGES["plain"][1], model=model) for model in (1, 0, 1)]

    assert by_model(changes, 3, "abc") == (("b",), ("a", "c"), ())
    assert by_model([], 3, "") == ()


def test_factors_are_as_large_as_is_said() -> None:
    _, change = CHANGES["plain"]

    factors = draw_factors(change, np.random.default_rng(0), scale=0.01)

    assert [factor.shape for factor in factors] == [(8, 1024), (4096, 8)]
    assert all(0.005 < float(factor.std()) < 0.02 for factor in factors)
