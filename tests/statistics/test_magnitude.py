"""The search for the k-th magnitude equals a stable sort, however it is asked and answered."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from oracles import trim_by_sorting

from streammerge.statistics import BLOCK, count_blocks, selecting
from streammerge.statistics.magnitude import (
    SAMPLE_RUN,
    STATE_ARRAYS,
    Bins,
    MagnitudeSearch,
    answer_block,
    choose_sample_runs,
)
from streammerge.statistics.selecting import select_block, select_rows
from streammerge.statistics.topk import TiePolicy, TopK, count_kept, kept_count

DTYPES = {32: np.float32, 64: np.float64}
PIECE = 50
"""Elements per block in most tests here: the search never asks how long a block is."""

quick = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])


@dataclass(frozen=True)
class Scope:
    """Blocks of magnitudes, and how the search meets them."""

    blocks: list[np.ndarray]
    seed: int
    """Decides the order of the blocks in every round, and the sample."""
    values_limit: int
    """Most magnitudes that are collected."""
    sampled: float
    """Fraction of the elements in the sample; 0 for no sample."""
    hostile: bool
    """Whether the sample is of other numbers, so that its guess is worthless."""
    interrupted: bool = False
    """Whether it is saved now and then, and another search goes on from there."""


def search(scope: Scope, density: float, policy: TiePolicy, bits: int) -> tuple[TopK, int]:
    """Run a search to its end; returns the result and the number of rounds."""
    rng = np.random.default_rng(scope.seed)
    numel = sum(block.size for block in scope.blocks)

    def begin() -> MagnitudeSearch:
        return MagnitudeSearch(
            numel=numel,
            blocks=len(scope.blocks),
            k=kept_count(density, numel),
            tie_policy=policy,
            room=np.full(scope.values_limit, np.nan, DTYPES[bits]),
            spare=np.full(scope.values_limit, np.nan, DTYPES[bits]),
        )

    running = begin()
    if scope.sampled and numel:
        flat = np.concatenate(scope.blocks)
        sample = rng.choice(flat, max(1, int(scope.sampled * numel)))
        if scope.hostile:
            sample = np.abs(rng.normal(rng.choice([0.0, 1e30]), 1e-3, 20)).astype(flat.dtype)
        running.ask_after_sample(sample, run_numel=SAMPLE_RUN)
    masks = np.empty((2, max([block.size for block in scope.blocks], default=0)), dtype=bool)
    rounds = 0
    while running.result is None:
        rounds += 1
        assert rounds <= 12, "the search does not end"
        for index in rng.permutation(len(scope.blocks)):
            magnitudes = scope.blocks[index]
            running.answer(index, answer_block(running.question, magnitudes, masks))
            if scope.interrupted and rng.random() < 0.2:
                facts, arrays = running.state()
                facts = json.loads(json.dumps(facts))
                copies = {name: arrays[name].copy() for name in STATE_ARRAYS}
                running = begin()
                assert running.has_room_for(facts, copies)
                running.restore(facts, copies)
        running.conclude()
    return running.result, rounds


def kept_mask(scope: Scope, top: TopK) -> np.ndarray:
    """Return what the statistic says is kept, block by block, as a trim applies it."""
    kept = [np.zeros(0, dtype=bool)]
    for index, block in enumerate(scope.blocks):
        # NaN ranks above the threshold, whatever it is.
        mask = ~(block <= top.threshold)
        ties = np.flatnonzero(block == top.threshold)
        mask[ties[: top.ties_to_keep(index)]] = True
        kept.append(mask)
    return np.concatenate(kept)


def check(scope: Scope, density: float, policy: TiePolicy, bits: int) -> int:
    """Check every field of the result against a stable sort; returns the number of rounds."""
    flat = np.concatenate([np.zeros(0, dtype=DTYPES[bits]), *scope.blocks])
    expected = trim_by_sorting(flat, density, policy.value)
    top, rounds = search(scope, density, policy, bits)
    assert top.numel == flat.size
    assert top.kept == expected.keep.sum()
    if expected.threshold is None:
        assert (top.threshold, top.kept) == (float("inf"), 0)
    elif density >= 1 or flat.size == 0:
        assert (top.threshold, top.kept) == (0.0, flat.size)
    else:
        np.testing.assert_equal(top.threshold, expected.threshold)
        assert (top.greater, top.equal) == (expected.greater, expected.equal)
        assert (kept_mask(scope, top) == expected.keep).all()
    return rounds


def cut(flat: np.ndarray, lengths: list[int]) -> list[np.ndarray]:
    """Cut an array into blocks of the given lengths, repeated; the last one may be short."""
    blocks, begin, index = [], 0, 0
    while begin < flat.size:
        blocks.append(flat[begin : begin + lengths[index % len(lengths)]])
        begin += lengths[index % len(lengths)]
        index += 1
    return blocks


@st.composite
def scopes(draw: st.DrawFn, bits: int, *, infinite: bool = False) -> Scope:
    """Draw magnitudes: smooth, on a grid, over the whole range of exponents, or all equal."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    numel = draw(st.integers(0, 1500))
    dtype = DTYPES[bits]
    kind = draw(st.sampled_from(["smooth", "grid", "zeros", "wild", "equal"]))
    if kind == "smooth":
        flat = np.abs(rng.normal(size=numel)).astype(dtype)
    elif kind == "grid":
        flat = rng.integers(0, draw(st.integers(1, 9)), numel).astype(dtype) / 4
    elif kind == "zeros":
        flat = (rng.random(numel) < 0.1).astype(dtype)
    elif kind == "wild":
        # Every exponent and the subnormals: uniform bit patterns.
        pattern = {32: np.uint32, 64: np.uint64}[bits]
        top = int(dtype(np.inf).view(pattern))
        flat = rng.integers(0, top, numel, dtype=pattern).view(dtype)
    else:
        flat = np.full(numel, draw(st.sampled_from([0.0, 1e-45, 0.3, 1e38])), dtype=dtype)
    if infinite:
        flat[rng.random(numel) < 0.2] = np.inf
    lengths = draw(st.lists(st.integers(1, 400), min_size=1, max_size=4))
    return Scope(
        cut(flat, lengths),
        seed=draw(st.integers(0, 99)),
        values_limit=draw(st.sampled_from([0, 1, 7, 100, 10_000])),
        sampled=draw(st.sampled_from([0.0, 0.02, 0.5])),
        hostile=draw(st.booleans()),
        interrupted=draw(st.booleans()),
    )


densities = st.floats(0, 1) | st.sampled_from([0.0, 1.0, 0.5, 0.29, 1e-3, 1 - 2**-53])


@pytest.mark.parametrize("bits", DTYPES)
@quick
@given(data=st.data(), density=densities, policy=st.sampled_from(TiePolicy))
def test_the_search_equals_a_stable_sort(
    bits: int, data: st.DataObject, density: float, policy: TiePolicy
) -> None:
    check(data.draw(scopes(bits)), density, policy, bits)


@pytest.mark.parametrize("bits", DTYPES)
@quick
@given(data=st.data(), density=densities, policy=st.sampled_from(TiePolicy))
def test_infinities_are_magnitudes_like_others(
    bits: int, data: st.DataObject, density: float, policy: TiePolicy
) -> None:
    scope = data.draw(scopes(bits, infinite=True))
    flat = np.concatenate([np.zeros(0), *scope.blocks])
    if 0 < kept_count(density, flat.size) <= np.isinf(flat).sum() and density < 1:
        # The threshold is infinite, which also stands for "nothing is kept": counts must tell.
        top, _ = search(scope, density, policy, bits)
        expected = trim_by_sorting(flat, density, policy.value)
        assert (top.threshold, top.kept) == (float("inf"), expected.keep.sum())
        assert (kept_mask(scope, top) == expected.keep).all()
        return
    check(scope, density, policy, bits)


@pytest.mark.parametrize("limit", [0, 10, 10_000])
@pytest.mark.parametrize("nans", [1, 3, 30])
@pytest.mark.parametrize("sampled", [0.0, 0.3])
def test_nan_ranks_above_everything(limit: int, nans: int, sampled: float) -> None:
    rng = np.random.default_rng(nans)
    flat = rng.integers(0, 20, 400).astype(np.float32)
    flat[rng.choice(400, nans, replace=False)] = np.nan
    scope = Scope(cut(flat, [PIECE]), 1, limit, 0.0, hostile=False)
    for density in (0.1, 0.5, 0.9):
        for policy in TiePolicy:
            check(scope, density, policy, 32)


@pytest.mark.parametrize("limit", [0, 10, 10_000])
@pytest.mark.parametrize("nans", [40, 41, 400])
def test_more_nan_than_are_kept_leave_room_for_no_number(nans: int, limit: int) -> None:
    flat = np.arange(400, dtype=np.float32)
    flat[np.random.default_rng(1).choice(400, nans, replace=False)] = np.nan
    scope = Scope(cut(flat, [PIECE]), 1, limit, 0.0, hostile=False)
    for policy in TiePolicy:
        top, _ = search(scope, 0.1, policy, 32)

        # NaN times zero is NaN: whether a trim keeps 40 of them or all makes no difference.
        assert 0 <= top.ties_kept <= top.kept <= nans
        assert policy is TiePolicy.STRICT or top.kept >= 40
        assert not (flat > top.threshold).any()


@quick
@given(
    numel=st.integers(1, 300),
    density=densities,
    policy=st.sampled_from(TiePolicy),
    seed=st.integers(0, 99),
    rest=st.sampled_from([(0.5, 10), (0.0, 10), (0.0, 1000)]),
)
@example(numel=100, density=0.29, policy=TiePolicy.EXACT, seed=0, rest=(0.0, 1000))
def test_the_order_of_answers_changes_nothing(
    numel: int, density: float, policy: TiePolicy, seed: int, rest: tuple[float, int]
) -> None:
    flat = np.random.default_rng(seed).integers(0, 4, numel).astype(np.float32)
    sampled, limit = rest
    results = {
        search(Scope(cut(flat, [17]), order, limit, sampled, hostile=False), density, policy, 32)[0]
        for order in range(4)
    }
    assert len(results) == 1


@pytest.mark.parametrize(
    ("density", "numel", "k"),
    [
        (0.29, 100, 28),  # 0.29 * 100 is 28.999999999999996
        (0.57, 100, 56),
        (0.7, 10, 7),
        (0.1, 9, 0),  # nothing is kept
        (1.0, 7, 7),
        (0.999999, 7, 6),
    ],
)
def test_k_is_the_float_product_truncated(density: float, numel: int, k: int) -> None:
    assert kept_count(density, numel) == k
    flat = np.arange(1, numel + 1, dtype=np.float32)
    top, _ = search(Scope([flat], 0, 10**6, 0.0, hostile=False), density, TiePolicy.EXACT, 32)
    assert top.kept == k


def test_what_fits_is_found_in_one_sweep_and_the_rest_in_a_few() -> None:
    rng = np.random.default_rng(0)
    smooth = np.abs(rng.normal(size=20_000)).astype(np.float32)
    coarse = rng.integers(0, 9, 20_000).astype(np.float32)

    def rounds(flat: np.ndarray, limit: int, sampled: float, bits: int = 32) -> int:
        scope = Scope(cut(flat, [1000]), 3, limit, sampled, hostile=False)
        return check(scope, 0.2, TiePolicy.EXACT, bits)

    assert rounds(smooth, 20_000, 0.0) == 1
    # A good sample names a band that holds the threshold.
    assert rounds(smooth, 10_000, 0.25) == 1
    # Histograms need two sweeps for 31 bits, and one more to find the block of the last tie.
    assert rounds(smooth, 0, 0.0) == 2
    assert rounds(coarse, 0, 0.0) == 3
    # 63 bits in steps of 16.
    assert rounds(smooth.astype(np.float64), 0, 0.0, bits=64) == 4


@pytest.mark.parametrize("gathered", [1, 4])
@pytest.mark.parametrize("seed", range(4))
def test_rows_of_different_scales_are_found_in_one_sweep_too(seed: int, gathered: int) -> None:
    """A run of the sample lies in one row, so it tells less than as many scattered elements."""
    run_numel = gathered * SAMPLE_RUN
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(1024, 16)).astype(np.float32)
    flat = np.abs(rows @ rng.normal(size=(16, run_numel)).astype(np.float32)).reshape(-1)
    searching = MagnitudeSearch(
        numel=flat.size,
        blocks=count_blocks(flat.size),
        k=kept_count(0.2, flat.size),
        tie_policy=TiePolicy.EXACT,
        room=np.empty(flat.size // 4, np.float32),
        spare=np.empty(flat.size // 4, np.float32),
    )

    runs = choose_sample_runs(flat.size, 64 // gathered, run_numel=run_numel)
    sample = np.concatenate([flat[begin:][:count] for begin, count in runs])
    searching.ask_after_sample(sample, run_numel=run_numel)
    masks = np.empty((2, BLOCK), dtype=bool)
    for block, begin in enumerate(range(0, flat.size, BLOCK)):
        magnitudes = flat[begin : begin + BLOCK]
        searching.answer(block, answer_block(searching.question, magnitudes, masks))
    searching.conclude()

    assert searching.result is not None
    assert searching.result.kept == kept_count(0.2, flat.size)


def test_bins_cover_exactly_the_interval_they_ask_about() -> None:
    magnitudes = np.array([0.0, 0.5, 1.0, 1.5, 2.0, np.inf, np.nan], dtype=np.float32)
    low, high = (int(np.float32(each).view(np.uint32)) for each in (1.0, 2.0))
    counted = answer_block(Bins(low, high), magnitudes, np.empty((2, 7), dtype=bool))

    # Infinity and NaN lie above, 0 and 0.5 below.
    assert counted.above == 2
    assert counted.histogram is not None
    assert counted.histogram.sum() == 3


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    numel=st.integers(0, 300),
    levels=st.sampled_from([1, 3, 1000]),
    nan=st.booleans(),
    density=st.floats(0, 1),
    policy=st.sampled_from(TiePolicy),
)
def test_a_scope_of_one_block_is_selected_at_once_as_by_searching(
    *, seed: int, numel: int, levels: int, nan: bool, density: float, policy: TiePolicy
) -> None:
    generator = np.random.default_rng(seed)
    magnitudes = generator.integers(0, levels, numel).astype(np.float32)
    magnitudes[: numel // 7 if nan else 0] = np.nan
    room = np.empty((2, numel), dtype=np.float32)
    k = kept_count(density, numel)
    search = MagnitudeSearch(
        numel=numel, blocks=1, k=k, tie_policy=policy, room=room[0], spare=room[1]
    )
    while search.result is None:
        masks = np.empty((2, numel), dtype=bool)
        search.answer(0, answer_block(search.question, magnitudes, masks))
        search.conclude()

    assert select_block(magnitudes, k, policy) == search.result


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(0, 5),
    numel=st.sampled_from([0, 1, 2, 129, 700, 4096, 5001]),
    levels=st.sampled_from([1, 3, 40, 10**6]),
    nan=st.sampled_from([0, 10, 3000]),
    density=st.sampled_from([0.0, 0.01, 0.2, 0.5, 0.97, 1.0]),
    policy=st.sampled_from(TiePolicy),
    dtype=st.sampled_from([np.float32, np.float64]),
)
def test_scopes_of_one_size_are_selected_together_as_each_by_itself(
    *,
    seed: int,
    rows: int,
    numel: int,
    levels: int,
    nan: int,
    density: float,
    policy: TiePolicy,
    dtype: type[np.float32 | np.float64],
) -> None:
    generator = np.random.default_rng(seed)
    magnitudes = (generator.integers(0, levels, (rows, numel)) * 2.0**-9).astype(dtype)
    # Every row of a size of its own; a few special values in the first one.
    magnitudes *= np.arange(1, rows + 1, dtype=dtype)[:, None]
    magnitudes[:1, :nan] = np.nan
    magnitudes[1:2, :nan] = np.inf
    scratch = torch.empty(magnitudes.size)

    k = kept_count(density, numel)
    together = select_rows(magnitudes, k, policy, scratch)

    assert together == [select_block(row, k, policy) for row in magnitudes]


def test_most_thresholds_among_distinct_magnitudes_need_no_partition_of_their_scope(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It would take most of the time; two guesses nearly always have the threshold between them."""
    partitioned = 0

    def count_partitions(magnitudes: np.ndarray, k: int) -> tuple[float, int, int] | None:
        nonlocal partitioned
        partitioned += 1
        return by_partition(magnitudes, k)

    by_partition = selecting._kth_by_partition
    monkeypatch.setattr(selecting, "_kth_by_partition", count_partitions)
    magnitudes = np.abs(np.random.default_rng(0).standard_normal((40, 4096)))

    select_rows(magnitudes, kept_count(0.2, 4096), TiePolicy.EXACT, torch.empty(magnitudes.size))

    assert partitioned <= 4


@pytest.mark.parametrize("policy", TiePolicy)
@pytest.mark.parametrize("levels", [2, 5])
def test_what_each_block_keeps_adds_up(policy: TiePolicy, levels: int) -> None:
    # At a density of 0.9 the threshold is 0, and only some of the zeros are kept.
    flat = np.random.default_rng(5).integers(0, levels, 1000).astype(np.float32)
    scope = Scope(cut(flat, [PIECE]), 0, 10_000, 0.0, hostile=False)
    masks = np.empty((2, PIECE), dtype=bool)
    for density in (0.0, 0.05, 0.3, 0.9, 1.0):
        top, _ = search(scope, density, policy, 32)
        counts = [count_kept(block, top, index, masks) for index, block in enumerate(scope.blocks)]

        assert sum(counts) == trim_by_sorting(flat, density, policy.value).keep.sum()


@given(
    numel=st.integers(1, 40 * SAMPLE_RUN),
    runs=st.integers(0, 70),
    run_numel=st.sampled_from([SAMPLE_RUN, 4 * SAMPLE_RUN]),
)
@settings(deadline=None)
def test_sample_runs_lie_apart_inside_the_tensor_and_within_blocks(
    numel: int, runs: int, run_numel: int
) -> None:
    chosen = choose_sample_runs(numel, runs, run_numel=run_numel)

    assert len(chosen) == min(runs, -(-numel // run_numel))
    ends = [start + count for start, count in chosen]
    assert all(end <= start for end, (start, _) in zip(ends, chosen[1:], strict=False))
    for (start, count), end in zip(chosen, ends, strict=True):
        assert 0 < count <= run_numel
        assert end <= numel
        assert start // BLOCK == (end - 1) // BLOCK


def test_blocks_are_counted_up() -> None:
    counts = {0: 0, 1: 1, BLOCK: 1, BLOCK + 1: 2, 5 * BLOCK: 5}
    assert {numel: count_blocks(numel) for numel in counts} == counts
