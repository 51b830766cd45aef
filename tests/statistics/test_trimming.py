"""The steps that work on several small tensors at once equal the plain ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streammerge.statistics.selecting import select_block
from streammerge.statistics.topk import TiePolicy, TopK, count_kept, kept_count
from streammerge.statistics.trimming import mark_, mark_unseen_, trim_, trim_rows_


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    numel=st.sampled_from([1, 2, 127, 128, 129, 700, 4096]),
    levels=st.sampled_from([1, 2, 5, 10**6]),
    densities=st.lists(st.sampled_from([0.0, 0.01, 0.2, 0.5, 0.97, 1.0]), min_size=1, max_size=5),
    policy=st.sampled_from(TiePolicy),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_rows_are_trimmed_together_as_each_by_itself(
    *,
    seed: int,
    numel: int,
    levels: int,
    densities: list[float],
    policy: TiePolicy,
    dtype: torch.dtype,
) -> None:
    generator = np.random.default_rng(seed)
    values = generator.integers(-levels, levels + 1, (len(densities), numel)) / 8
    rows = torch.from_numpy(values).to(dtype)
    tops = [
        select_block(row.abs().numpy(), kept_count(density, numel), policy)
        for row, density in zip(rows, densities, strict=True)
    ]

    _assert_trimmed_alike(rows, tops, [0] * len(densities))


@settings(deadline=None)
@given(seed=st.integers(0, 2**32 - 1), cutoff=st.integers(0, 40), cutoff_block=st.integers(0, 3))
def test_rows_of_one_scope_keep_ties_up_to_the_cutoff(
    seed: int, cutoff: int, cutoff_block: int
) -> None:
    """Rows before the cut-off block keep all ties, those after it none."""
    generator = np.random.default_rng(seed)
    rows = torch.from_numpy(generator.integers(-3, 4, (4, 300)).astype(np.float32))
    top = TopK(2.0, rows.numel(), 300, 300, 100, cutoff_block, cutoff)

    _assert_trimmed_alike(rows, [top] * len(rows), list(range(len(rows))))


def test_one_tie_of_every_row_is_kept() -> None:
    rows = torch.tensor([[2.0, -2.0, 3.0, 1.0, 2.0], [1.0, 0.0, 2.0, -3.0, -2.0]])
    top = TopK(2.0, 5, 1, 2, 1, 0, 1)
    masks = np.empty((2, rows.numel()), dtype=bool)

    trim_rows_(rows, [top, top], [0, 0], magnitudes=torch.empty(rows.numel()), masks=masks)

    assert rows.tolist() == [[2, 0, 3, 0, 0], [0, 0, 2, -3, 0]]


def _assert_trimmed_alike(rows: torch.Tensor, tops: list[TopK], blocks: list[int]) -> None:
    together, alone = rows.clone(), rows.clone()
    masks = np.empty((2, rows.numel()), dtype=bool)
    trim_rows_(together, tops, blocks, magnitudes=torch.empty_like(rows).view(-1), masks=masks)
    for row, top, block in zip(alone, tops, blocks, strict=True):
        trim_(row, top, block)
    # Equal numbers, not equal bits: zeros may differ in their sign.
    assert torch.equal(together, alone)


@pytest.mark.parametrize("keep_ties", [0, 1, 3, 700, None])
@pytest.mark.parametrize("numel", [1, 127, 128, 4000])
def test_marks_are_those_of_a_look_at_nothing(numel: int, keep_ties: int | None) -> None:
    values = torch.randint(-3, 4, (numel,), generator=torch.Generator().manual_seed(1)).float()
    equal = int((values.abs() == 2).sum())
    kept = equal if keep_ties is None else min(keep_ties, equal)
    block = 2 if keep_ties is None else 1
    top = TopK(2.0, 10 * numel, int((values.abs() > 2).sum()), equal, kept, block, kept)
    masks = np.empty((2, numel), dtype=np.bool_)

    found = mark_(values.clone(), top, 1, masks)

    assert torch.equal(found, mark_unseen_(values.clone(), top, 1))
    assert int(found.sum()) == int((values.abs() > 2).sum()) + kept


def test_all_that_is_kept_is_marked_by_one() -> None:
    values = torch.tensor([3.0, -1.0, 0.0])
    top = TopK(0.0, 3, 3, 0, 0, 0, 0)
    masks = np.empty((2, 3), dtype=bool)

    assert mark_(values.clone(), top, 0, masks).tolist() == [1, 1, 1]
    assert mark_unseen_(values.clone(), top, 0).tolist() == [1, 1, 1]


def test_an_empty_tensor_keeps_nothing_of_the_block_that_follows_it() -> None:
    top = TopK(2.0, 10, 1, 3, 2, 0, 2)
    masks = np.empty((2, 0), dtype=bool)

    assert mark_(torch.empty(0), top, 0, masks).shape == (0,)
    assert count_kept(np.empty(0, np.float32), top, 0, masks) == 0


def test_not_a_number_is_marked_as_what_ranks_above_everything() -> None:
    nan = float("nan")
    values = torch.tensor([1.0, nan, -3.0, 2.0, nan, 2.0])
    top = TopK(2.0, 6, 3, 2, 1, 0, 1)
    masks = np.empty((2, 6), dtype=bool)

    for mark in (lambda row: mark_(row, top, 0, masks), lambda row: mark_unseen_(row, top, 0)):
        assert mark(values.clone()).tolist() == [0, 1, 1, 1, 1, 0]
    kept = trim_(values.clone(), top, 0)
    assert (kept.isnan() | (kept != 0)).tolist() == [False, True, True, True, True, False]
