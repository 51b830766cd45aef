"""Rounds of totals and ranks: the same bits in any order, by any cut, from any snapshot."""

from __future__ import annotations

import math
import pickle
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracles import trim_to

from streammerge.dtypes import DType
from streammerge.engine.asking import Asking, BlockAnswer
from streammerge.engine.plain import bind_numbers
from streammerge.engine.scopes import ScopeStatistics
from streammerge.methods.base import Work
from streammerge.methods.programs import Programs, found_of_nothing
from streammerge.plan.budgeting import search_bytes, values_limit
from streammerge.statistics import BLOCK
from streammerge.statistics.magnitude import (
    SAMPLE_RUN,
    Counted,
    answer_block,
    choose_sample_runs,
)
from streammerge.statistics.rounds import NOTHING, Answers, Found, Rank, Round
from streammerge.statistics.topk import TiePolicy, keep_everything
from streammerge.statistics.totals import join_totals, no_totals
from streammerge.statistics.trimming import mark_unseen_, trim_
from streammerge.tiles.compiling import compile_result, compile_sinks
from streammerge.tiles.interpreter import count_rows, run_program
from streammerge.tiles.program import Op, Program
from streammerge.tiles.totalling import HostSinks, total_rows
from streammerge.tiles.writing import (
    Row,
    Sheet,
    Sink,
    dot,
    in_top,
    keep_largest,
    largest,
    ranked,
    total,
)

SOURCES = 2
quick = settings(
    deadline=None,
    max_examples=80,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


def asking(share: float, policy: TiePolicy) -> Work:
    """Return what asks all that can be asked, in three rounds of which each needs the one before."""

    def shared(sheet: Sheet) -> Row:
        first, second = sheet.values
        return abs(first) + abs(second)

    def sizes(sheet: Sheet) -> Sequence[Sink]:
        first, second = sheet.values
        return [total(shared(sheet)), dot(first, second), largest(first), ranked(shared(sheet))]

    def settle_sizes(answers: Answers) -> Sequence[float]:
        size, product, most = answers.totals
        (top,) = answers.tops
        return [size, product, max(most, 0.5), top.threshold if math.isfinite(top.threshold) else 9]

    def scaled(sheet: Sheet) -> Sequence[Sink]:
        first, second = sheet.values
        by_size = first / sheet.number(2)
        return [
            ranked(by_size),
            ranked(second * sheet.number(3)),
            total(in_top(shared(sheet), 0)),
        ]

    def ranks(numel: int, before: Found) -> Sequence[Rank]:
        # Depends on the sign of what was found, and asks for all of one of them.
        k = int(share * numel)
        return [Rank(k if before.numbers[1] >= 0 else numel - k, policy), Rank(numel, policy)]

    def trimmed(sheet: Sheet) -> Sequence[Sink]:
        first, _ = sheet.values
        kept = keep_largest(first / sheet.number(2), 1)
        return [dot(kept, kept), largest(abs(kept)), total(abs(kept))]

    def settle_last(answers: Answers) -> Sequence[float]:
        squares, most, size = answers.totals
        return [squares + answers.before.numbers[0], most, size]

    return Work(
        lambda sheet: sheet.values[0],
        (
            Round(sizes, lambda numel, _: [Rank(int(share * numel), policy)], settle_sizes),
            Round(scaled, ranks),
            Round(trimmed, settle=settle_last),
        ),
    )


def programs(work: Work, sources: int = SOURCES) -> Programs:
    sheet = Sheet(sources, has_base=False)
    rounds = tuple(compile_sinks(each.sinks(Sheet(sources, False))) for each in work.rounds)
    return Programs(work, compile_result(work.merge(sheet)), rounds, sheet.sources, sheet.has_base)


@dataclass
class Block:
    """One block of both sources; see :class:`streammerge.tiles.interpreter.Models`."""

    rows: np.ndarray
    index: int
    found: Found = NOTHING
    program: Program | None = None

    def source(self, source: int, out: torch.Tensor) -> None:
        out.copy_(torch.from_numpy(self.rows[source]))

    def trim_(self, row: torch.Tensor, trim: int) -> None:
        trim_(row, self.found.tops[self.program.trims[trim]], self.index)

    def mark_(self, row: torch.Tensor, trim: int) -> None:
        mark_unseen_(row, self.found.tops[self.program.trims[trim]], self.index)


def run(
    program: Program, block: Block, found: Found, on_ranked: Callable[[int, np.ndarray], None]
) -> np.ndarray:
    """Run a round's program on a block; return its totals."""
    block.program, block.found = program, found
    sinks = HostSinks(program, lambda at, row: on_ranked(at, row.numpy()))
    numel = block.rows.shape[1]
    run_program(
        program,
        block,  # type: ignore[arg-type]
        numbers=bind_numbers(program, found),
        memory=torch.empty(count_rows(program), numel, dtype=torch.from_numpy(block.rows).dtype),
        row_numel=numel,
        sinks=sinks,
    )
    return sinks.totals[0]


def answer(wanted: Programs, block: Block, asked: Asking) -> BlockAnswer:
    """Answer as a stage does."""
    program = wanted.rounds[asked.round]
    counted: list[Counted | None] = [None] * program.ranked
    masks = np.empty((2, block.rows.shape[1]), dtype=np.bool_)

    def count(at: int, values: np.ndarray) -> None:
        question = asked.questions[at]
        if question is not None:
            own = answer_block(question, values, masks)
            counted[at] = own

    totals = run(program, block, asked.found, count)
    return BlockAnswer(tuple(counted), totals if asked.totals else None)


def find_plainly(
    wanted: Programs, blocks: list[Block]
) -> tuple[list[list[Any]], tuple[float, ...]]:
    """Return what a sort says about every rank, and the numbers: by whole scopes in memory."""
    numel = sum(block.rows.shape[1] for block in blocks)
    known, trims = NOTHING, []
    for program, asked in zip(wanted.rounds, wanted.work.rounds, strict=True):
        offered: list[list[np.ndarray]] = [[] for _ in range(program.ranked)]
        of_blocks = [
            run(program, block, known, lambda at, row: offered[at].append(row.copy()))  # noqa: B023
            for block in blocks
        ]
        totals = []
        for column, kind in zip(np.array(of_blocks).T, program.totals, strict=True):
            exact = sum(map(Fraction, column.tolist()))
            totals.append(max(column) if kind is Op.LARGEST else float(exact))
        # Where elements lie does not matter to what comes of it, but for ties; see the sort.
        tops = []
        for wish, parts in zip(asked.ranks(numel, known), offered, strict=True):
            flat = np.concatenate(parts)
            trim = trim_to(flat, wish.k, wish.tie_policy.value)
            tops.append(top_of(trim, parts))
            trims.append([trim, parts])
        known = known.joined(asked.concluded(Answers(numel, tuple(totals), tuple(tops), known)))
    return trims, known.numbers


def top_of(trim: Any, parts: list[np.ndarray]) -> Any:
    """Return what a sort says as a statistic over blocks."""
    numel = trim.keep.size
    if trim.keep.all() and trim.threshold == 0.0:
        return keep_everything(numel)
    threshold = float("inf") if trim.threshold is None else trim.threshold
    begin, last, ties = 0, -1, 0
    for index, part in enumerate(parts):
        kept = trim.keep[begin : begin + part.size] & (np.abs(part) == threshold)
        begin += part.size
        if kept.any():
            last, ties = index, int(kept.sum())
    total_kept = int((trim.keep & (np.abs(np.concatenate(parts)) == threshold)).sum())
    kind = type(keep_everything(0))
    return kind(threshold, numel, trim.greater, trim.equal, total_kept, last, ties)


def search(
    wanted: Programs,
    blocks: list[Block],
    *,
    limit: int,
    rng: np.random.Generator,
    snapshot: Path | None = None,
) -> Found:
    """Find all that is asked, some blocks at a time in any order; now and then from a snapshot."""
    numel = sum(block.rows.shape[1] for block in blocks)
    dtype = DType.F32 if not blocks or blocks[0].rows.dtype == np.float32 else DType.F64

    def begin() -> ScopeStatistics:
        return ScopeStatistics(
            wanted, numel=numel, blocks=len(blocks), compute_dtype=dtype, limit=limit
        )

    statistics = begin()
    sweeps = 0
    while statistics.found is None:
        sweeps += 1
        assert sweeps <= 40, "the search does not end"
        _sample(statistics, wanted, blocks)
        cuts = np.sort(rng.choice(len(blocks) + 1, size=3))
        pieces = [
            range(a, b) for a, b in zip([0, *cuts], [*cuts, len(blocks)], strict=True) if a < b
        ]
        left = [pieces[at] for at in rng.permutation(len(pieces))]
        while left:
            piece = left.pop()
            if statistics.has_answers_of(piece.start, len(piece)):
                continue
            asked, elsewhere = statistics.asking, rng.random() < 0.3
            if elsewhere:
                asked = sent(asked)
            answers = [answer(wanted, blocks[at], asked) for at in piece]
            statistics.add(piece.start, sent(answers) if elsewhere else answers)
            if snapshot is not None and rng.random() < 0.4:
                statistics.save(snapshot)
                if rng.random() < 0.5:
                    # What was answered after the snapshot is lost.
                    left = list(pieces)
                    statistics = begin()
                    assert statistics.restore(snapshot)
        statistics.conclude()
    return statistics.found


def sent(value: Any) -> Any:
    """Return what another process has of a question, or this one of its answer."""
    return pickle.loads(pickle.dumps(value))  # noqa: S301 - our own


def _sample(statistics: ScopeStatistics, wanted: Programs, blocks: list[Block]) -> None:
    """Sample as the schedule does, where a round asks for it."""
    numel = sum(b.rows.shape[1] for b in blocks)
    runs = choose_sample_runs(numel, statistics.sample_runs, run_numel=SAMPLE_RUN)
    if not runs:
        return
    asked = statistics.asking
    rows = np.concatenate([block.rows for block in blocks], axis=1)
    statistics.prepare_sample(sum(count for _, count in runs), SAMPLE_RUN)
    for start, count in runs:
        room = statistics.sample_room(count)

        def keep(at: int, values: np.ndarray, room: np.ndarray = room) -> None:
            room[at] = values

        part = Block(rows[:, start : start + count], 0)
        run(wanted.rounds[asked.round], part, asked.found, keep)
    statistics.conclude_sample()


def cut(rows: np.ndarray, lengths: Sequence[int]) -> list[Block]:
    """Cut a scope into blocks of these lengths, again and again."""
    blocks, begin = [], 0
    while begin < rows.shape[1]:
        end = begin + lengths[len(blocks) % len(lengths)]
        blocks.append(Block(np.ascontiguousarray(rows[:, begin:end]), len(blocks)))
        begin = end
    return blocks


def draw_rows(seed: int, numel: int, dtype: Any, *, few: bool) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if few:
        return (rng.integers(-4, 5, (SOURCES, numel)) / 4).astype(dtype)
    return rng.standard_normal((SOURCES, numel)).astype(dtype)


@quick
@given(
    seed=st.integers(0, 2**32),
    numel=st.integers(0, 900),
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=4),
    limit=st.sampled_from([0, 1, 40, 10_000]),
    share=st.sampled_from([0.0, 0.1, 0.5, 0.97, 1.0]),
    policy=st.sampled_from(TiePolicy),
    dtype=st.sampled_from([np.float32, np.float64]),
    few=st.booleans(),
)
def test_rounds_find_what_a_sort_and_exact_sums_find(
    *,
    seed: int,
    numel: int,
    lengths: list[int],
    limit: int,
    share: float,
    policy: TiePolicy,
    dtype: Any,
    few: bool,
    tmp_path: Path,
) -> None:
    """In any order, by any cut into pieces, and from snapshots in the middle of any round."""
    rows = draw_rows(seed, numel, dtype, few=few)
    wanted = programs(asking(share, policy))
    blocks = cut(rows, lengths)
    rng = np.random.default_rng(seed)
    found = search(wanted, blocks, limit=limit, rng=rng)

    again = search(wanted, blocks, limit=10_000 - limit, rng=rng)
    resumed = search(wanted, blocks, limit=limit, rng=rng, snapshot=tmp_path / "saved")
    assert found == again == resumed
    if numel == 0:
        assert found == found_of_nothing(wanted)
        return
    trims, numbers = find_plainly(wanted, blocks)
    assert found.numbers == numbers
    for top, (trim, parts) in zip(found.tops, trims, strict=True):
        assert top.kept == trim.keep.sum()
        if 0 < top.kept < numel:
            assert (top.threshold, top.greater, top.equal) == (
                trim.threshold, trim.greater, trim.equal,
            )  # fmt: skip
            kept = [
                _kept_of(part, top.threshold, top.ties_to_keep(at)) for at, part in enumerate(parts)
            ]
            assert (np.concatenate(kept) == trim.keep).all()


def _kept_of(values: np.ndarray, threshold: float, ties: int | None) -> np.ndarray:
    magnitudes = np.abs(values)
    keep = magnitudes > threshold
    keep[np.flatnonzero(magnitudes == threshold)[:ties]] = True
    return keep


@pytest.mark.parametrize("few", [False, True])
def test_a_round_that_needs_one_samples_first_and_finds_the_same(few: object) -> None:
    """Each round anew: what it ranks is not what the one before has ranked."""
    rows = draw_rows(5, 40 * 8 * SAMPLE_RUN, np.float32, few=bool(few))
    wanted = programs(asking(0.3, TiePolicy.EXACT))
    blocks = cut(rows, [16 * SAMPLE_RUN])
    rng = np.random.default_rng(0)
    statistics = ScopeStatistics(
        wanted, numel=rows.shape[1], blocks=len(blocks), compute_dtype=DType.F32, limit=50_000
    )
    assert statistics.sample_runs == 40

    sampled = search(wanted, blocks, limit=50_000, rng=rng)

    assert sampled == search(wanted, blocks, limit=rows.shape[1], rng=rng)


def test_a_snapshot_of_another_scope_is_left_alone(tmp_path: Path) -> None:
    wanted = programs(asking(0.3, TiePolicy.EXACT))
    blocks = cut(draw_rows(1, 600, np.float32, few=False), [100])

    def begin(numel: int, blocks: int, limit: int) -> ScopeStatistics:
        return ScopeStatistics(
            wanted, numel=numel, blocks=blocks, compute_dtype=DType.F32, limit=limit
        )

    saved = begin(600, 6, 600)
    saved.add(0, [answer(wanted, block, saved.asking) for block in blocks[:3]])
    saved.save(tmp_path / "saved")

    # Another scope, another cut, and too little room for what was collected.
    for numel, n_blocks, limit in ((601, 6, 600), (600, 7, 600), (600, 6, 10)):
        other = begin(numel, n_blocks, limit)
        assert not other.restore(tmp_path / "saved")
        assert other.found is None
        assert (other.asking.round, other.asking.found) == (0, NOTHING)
        assert not other.has_answers_of(0, 1)
    assert not begin(600, 6, 600).restore(tmp_path / "nothing")


def test_what_does_not_depend_on_values_needs_no_sweep() -> None:
    def ranks(numel: int, _: Found) -> Sequence[Rank]:
        return [Rank(0, TiePolicy.EXACT), Rank(numel, TiePolicy.EXACT)]

    def settle(answers: Answers) -> Sequence[float]:
        return [float(answers.numel), float(answers.tops[1].kept)]

    only = Round(lambda sheet: [ranked(row) for row in sheet.values], ranks, settle)
    wanted = programs(Work(lambda sheet: sheet.values[0], (only, only)))
    statistics = ScopeStatistics(wanted, numel=77, blocks=1, compute_dtype=DType.F32, limit=10)

    assert statistics.found is not None
    assert statistics.found.numbers == (77.0, 77.0) * 2
    assert [top.kept for top in statistics.found.tops] == [0, 77] * 2


def test_a_scope_without_elements_is_settled_by_what_nothing_comes_to() -> None:
    wanted = programs(asking(0.5, TiePolicy.EXACT))
    statistics = ScopeStatistics(wanted, numel=0, blocks=0, compute_dtype=DType.F32, limit=0)

    assert statistics.found == found_of_nothing(wanted)


# -- totals


finite = st.floats(allow_nan=False, allow_infinity=False, width=64)


@given(st.lists(finite, max_size=60), st.integers(0, 99))
def test_totals_are_joined_with_one_rounding(terms: list[float], seed: int) -> None:
    column = np.array(terms, dtype=np.float64)[:, None]
    exact = sum(map(Fraction, terms), Fraction(0))
    try:
        expected = float(exact)
    except OverflowError:
        expected = math.inf if exact > 0 else -math.inf
    for each in (column, np.random.default_rng(seed).permutation(column)):
        ((found,), (most,)) = join_totals([Op.SUM], each), join_totals([Op.LARGEST], each)
        assert found == expected
        assert most == max(terms, default=-math.inf)


@pytest.mark.parametrize(
    ("terms", "expected"),
    [
        ([1e308, 1e308], math.inf),
        (
            [-8.959022487813407e304, -1.7967972326135346e308, 1.3482698511467371e308],
            -4.4942328371557883e307,
        ),
        ([1e308, 1e308, -1e308], 1e308),
        ([-1e308, -1e308], -math.inf),
        ([math.inf, 1.0], math.inf),
        ([math.inf, -math.inf], math.nan),
        ([math.nan, 1.0], math.nan),
        ([1e16, 1.0, -1e16], 1.0),  # a plain sum gives 0
        ([0.1] * 10, 1.0),
        ([], 0.0),
    ],
)
def test_totals_beyond_float64_are_what_adding_them_comes_to(
    terms: list[float], expected: float
) -> None:
    (found,) = join_totals([Op.DOT], np.array(terms, dtype=np.float64)[:, None])

    np.testing.assert_equal(found, expected)


def test_the_totals_of_nothing() -> None:
    kinds = (Op.SUM, Op.LARGEST, Op.DOT)

    assert no_totals(kinds, 2).tolist() == [[0.0, -math.inf, 0.0]] * 2
    assert join_totals(kinds, no_totals(kinds, 0)) == (0.0, -math.inf, 0.0)
    assert total_rows(Op.SUM, np.zeros((3, 0)), np.zeros((3, 0))).tolist() == [0.0] * 3


# -- memory


@pytest.mark.parametrize(
    ("n_ranked", "n_totals", "blocks"), [(3, 0, 200), (0, 500, 400), (2, 300, 400), (1, 4, 2000)]
)
def test_a_search_takes_no_more_than_is_reserved_for_it(
    n_ranked: int, n_totals: int, blocks: int
) -> None:
    """Its rooms, histograms, counts and totals, through two rounds that go by way of bins."""
    numel = blocks * BLOCK - 1
    limit = 20_000

    def sinks(sheet: Sheet) -> Sequence[Sink]:
        rows = sheet.values
        return [*(ranked(row) for row in rows[:n_ranked]), *(total(rows[0]),) * n_totals]

    def ranks(numel: int, _: Found) -> Sequence[Rank]:
        return [Rank(numel // 2, TiePolicy.EXACT)] * n_ranked

    asked = Round(sinks, ranks)
    wanted = programs(Work(lambda sheet: sheet.values[0], (asked, asked)), sources=4)
    few = np.linspace(0, 1, 50, dtype=np.float32)
    masks = np.empty((2, few.size), dtype=np.bool_)
    totals = np.ones(n_totals)

    def answer_all(statistics: ScopeStatistics) -> None:
        questions = statistics.asking.questions
        for block in range(blocks):
            # As if a block were few elements, each of them many times over.
            counted = tuple(
                None if each is None else _times(answer_block(each, few, masks), BLOCK // few.size)
                for each in questions
            )
            statistics.add(block, [BlockAnswer(counted, totals if n_totals else None)])
            del counted
        statistics.conclude()

    counts = wanted.counts
    rooms = (n_ranked + 1 if n_ranked else 0) * limit * 4
    tracemalloc.start()
    try:
        statistics = ScopeStatistics(
            wanted, numel=numel, blocks=blocks, compute_dtype=DType.F32, limit=limit
        )
        for _ in range(12):
            if statistics.found is None:
                answer_all(statistics)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert statistics.found is not None
    # Mappings of their own are not traced; what is known of each block is accounted for elsewhere.
    traced = peak + (rooms if rooms >= 2**20 else 0)
    assert traced <= search_bytes(counts, numel, 4, limit) + 200 * blocks + 2**17
    assert limit <= values_limit(numel)


def _times(counted: Counted, factor: int) -> Counted:
    histogram = counted.histogram
    if histogram is not None:
        histogram *= factor
    crowds = tuple(each * factor for each in counted.crowds)
    return Counted(counted.above * factor, counted.values, crowds, histogram)
