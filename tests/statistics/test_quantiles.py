"""Ranks of value find the k-th largest even where all are kept."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import trim_to

from streammerge.statistics.magnitude import MagnitudeSearch, answer_block
from streammerge.statistics.rounds import Rank
from streammerge.statistics.selecting import select_block, select_rows
from streammerge.statistics.topk import Floats, TiePolicy, TopK
from streammerge.statistics.trimming import mark_unseen_, trim_

PIECE = 50
"""Elements per block: the search never asks how long a block is."""


def search(flat: Floats, k: int, policy: TiePolicy, *, limit: int, sampled: bool) -> TopK:
    """Return what a search for a value finds, block by block."""
    blocks = [flat[begin : begin + PIECE] for begin in range(0, flat.size, PIECE)]
    running = MagnitudeSearch(
        numel=flat.size,
        blocks=len(blocks),
        k=k,
        tie_policy=policy,
        room=np.empty(limit, flat.dtype),
        spare=np.empty(limit, flat.dtype),
        of_value=True,
    )
    if sampled:
        running.ask_after_sample(flat[::7], run_numel=1024)
    masks = np.empty((2, PIECE), dtype=bool)
    while running.result is None:
        for index, block in enumerate(blocks):
            running.answer(index, answer_block(running.question, block, masks))
        running.conclude()
    return running.result


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    numel=st.sampled_from([1, 2, 3, 50, 51, 700]),
    levels=st.sampled_from([1, 2, 5, 10**6]),
    below=st.sampled_from([0, 1, 40]),
    policy=st.sampled_from(TiePolicy),
    dtype=st.sampled_from([np.float32, np.float64]),
    limit=st.sampled_from([0, 1, 10, 10_000]),
    sampled=st.booleans(),
    nans=st.integers(0, 2),
)
def test_a_value_is_that_of_a_sort(
    *,
    seed: int,
    numel: int,
    levels: int,
    below: int,
    policy: TiePolicy,
    dtype: type,
    limit: int,
    sampled: bool,
    nans: int,
) -> None:
    """Of all values, too; NaN ranks above everything."""
    rows = np.random.default_rng(seed).integers(1, 1 + levels, (3, numel)).astype(dtype)
    nans = min(nans, numel - 1)
    rows[:, :nans] = np.nan
    k = max(nans + 1, numel - below)

    together = select_rows(
        rows, k, policy, torch.from_numpy(np.empty_like(rows).reshape(-1)), of_value=True
    )

    for row, found in zip(rows, together, strict=True):
        expected = trim_to(row, k, policy.value, of_value=True)
        assert found.threshold == np.sort(row)[numel - k] == expected.threshold
        assert (found.greater, found.equal) == (expected.greater, expected.equal)
        assert found.kept == expected.keep.sum()
        assert select_block(row, k, policy, of_value=True) == found
        searched = search(row, k, policy, limit=limit, sampled=sampled)
        assert (searched.threshold, searched.greater, searched.equal, searched.ties_kept) == (
            found.threshold, found.greater, found.equal, found.ties_kept,
        )  # fmt: skip


@pytest.mark.parametrize("numel", [1, 5])
def test_whoever_asks_for_no_value_is_given_none(numel: int) -> None:
    everything = select_block(np.full(numel, 3.0), numel, TiePolicy.EXACT)

    assert (everything.threshold, everything.kept) == (0, numel)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_any_number_of_rows_has_the_values_that_are_asked_for(count: int) -> None:
    rows = np.array([[3.0, 1.0, 2.0], [9.0, 8.0, 7.0], [4.0, 4.0, 4.0]])[:count]

    found = select_rows(rows, 3, TiePolicy.EXACT, torch.empty(rows.size), of_value=True)

    assert [top.threshold for top in found] == [1.0, 7.0, 4.0][:count]
    assert [(top.greater, top.equal) for top in found] == [(2, 1), (2, 1), (0, 3)][:count]


def test_a_scope_without_elements_has_no_value() -> None:
    for k in (0, 1):
        found = select_block(np.zeros(0), k, TiePolicy.EXACT, of_value=True)
        assert (found.threshold, found.kept) == (0, 0)


def test_values_are_asked_where_they_decide_or_are_wanted() -> None:
    def is_open(k: int, *, of_value: bool) -> bool:
        return Rank(k, TiePolicy.EXACT, of_value=of_value).is_open(5)

    assert [is_open(k, of_value=False) for k in (0, 1, 4, 5)] == [False, True, True, False]
    assert [is_open(k, of_value=True) for k in (0, 1, 4, 5)] == [False, True, True, True]
    assert not Rank(1, TiePolicy.EXACT, of_value=True).is_open(0)


def test_all_are_kept_of_a_value_that_is_the_smallest() -> None:
    values = torch.tensor([3.0, -1.0, 2.0, 1.0])
    top = select_block(values.abs().numpy(), 4, TiePolicy.EXACT, of_value=True)

    assert torch.equal(trim_(values.clone(), top, 0), values)
    assert torch.equal(mark_unseen_(values.clone(), top, 0), torch.ones(4))
