"""The mathematics of devices equals the CPU's: masks, answers to questions, trims, divisions."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from fake_backend import Watch
from hypothesis import given
from hypothesis import strategies as st

from streammerge.rng import keep_mask, stream_key
from streammerge.statistics import BLOCK, count_blocks
from streammerge.statistics.in_tensors import (
    COUNTS,
    Answers,
    counted_blocks,
    total_blocks_,
    values_inside,
)
from streammerge.statistics.magnitude import BINS, Band, Bins, Question, answer_block
from streammerge.statistics.topk import TopK
from streammerge.statistics.trimming import trim_, trim_unseen_
from streammerge.tiles.compiling import compile_result
from streammerge.tiles.interpreter import count_rows, run_program
from streammerge.tiles.masks import draw_keep_mask
from streammerge.tiles.program import Op
from streammerge.tiles.totalling import total_rows
from streammerge.tiles.writing import Sheet

CPU = torch.device("cpu")


@given(
    st.integers(0, 2**128 - 1),
    st.integers(0, 2**40),
    st.integers(1, 5_000),
    st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.5, 1.0, 2**-32, 1 - 2**-32])),
)
def test_masks_equal_those_of_the_cpu(key: int, start: int, count: int, density: float) -> None:
    drawn = draw_keep_mask(key, 16 * start, count, density, device=CPU)

    np.testing.assert_array_equal(drawn.numpy(), keep_mask(key, 16 * start, count, density))


def test_the_lower_lane_decides_where_the_upper_one_does_not() -> None:
    """In so many elements, dozens have an upper lane exactly at the limit."""
    key = stream_key(2**64 - 1, 3, "model.weight")
    drawn = draw_keep_mask(key, 0, 2**22, 0.3, device=CPU)

    np.testing.assert_array_equal(drawn.numpy(), keep_mask(key, 0, 2**22, 0.3))


def magnitudes(dtype: torch.dtype) -> torch.Tensor:
    """Return three blocks and a bit: few distinct values, smooth ones, NaN and infinity."""
    generator = torch.Generator().manual_seed(1)
    numel = 3 * BLOCK + 77
    found = (torch.randint(-30, 31, (numel,), generator=generator) / 16).abs().to(dtype)
    found[::7] += torch.rand(found[::7].shape, generator=generator, dtype=dtype)
    found[::1001], found[5::1003] = float("nan"), float("inf")
    return found


def bits(value: float, dtype: torch.dtype) -> int:
    integer = torch.int32 if dtype == torch.float32 else torch.int64
    return int(torch.tensor(value, dtype=dtype).view(integer))


def answers_for(numel: int, limit: int, dtype: torch.dtype) -> Answers:
    answers = Answers(
        torch.full((count_blocks(numel), COUNTS), 7),
        torch.full((limit + 1,), -1.0, dtype=dtype),
        torch.tensor([7]),
        torch.full((BINS,), 7),
        torch.arange(BINS + 1, dtype=torch.int32),
    )
    answers.clear_()
    return answers


INFINITY = float("inf")
BANDS = [
    Band(0.0, INFINITY),
    Band(0.5, 1.0, (1.0, 0.75)),
    Band(0.5, 0.5, (0.5,)),
    Band(0.5, 0.5),
    Band(0.0, 1.25, (1.25, 1.0, 0.5, 0.0)),
    Band(3.0, 4.0),
]
INTERVALS = [(0.0, INFINITY), (0.5, 1.0), (1.0, 1.0), (1.0, INFINITY)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("question", [*BANDS, *INTERVALS], ids=str)
def test_answers_equal_those_of_the_cpu_block_by_block(
    question: Band | tuple[float, float], dtype: torch.dtype
) -> None:
    asked: Question = (
        question if isinstance(question, Band) else Bins(*(bits(end, dtype) for end in question))
    )
    values = magnitudes(dtype)
    answers = answers_for(values.numel(), values.numel(), dtype)
    # In two steps, as a device sees them; what makes the host wait is an error.
    with Watch():
        answers.add_(asked, values[: 2 * BLOCK], 0)
        answers.add_(asked, values[2 * BLOCK :], 2)
    counts = answers.counts.numpy()
    size = values_inside(asked, counts)
    histogram = answers.histogram.numpy()
    found = counted_blocks(asked, values.numel(), counts, answers.values.numpy()[:size], histogram)
    masks = np.empty((2, BLOCK), dtype=np.bool_)
    blocks = [values[begin : begin + BLOCK].numpy() for begin in range(0, values.numel(), BLOCK)]
    expected = [answer_block(asked, block, masks) for block in blocks]

    assert [each.above for each in found] == [each.above for each in expected]
    if isinstance(asked, Band):
        assert [each.crowds for each in found] == [each.crowds for each in expected]
        assert size == int(answers.filled)
        for own, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(own.values, other.values)
    else:
        assert [each.histogram is None for each in found] == [False, True, True, True]
        np.testing.assert_array_equal(histogram, sum(each.histogram for each in expected))


def test_values_without_room_are_counted_and_disturb_nothing() -> None:
    values = torch.arange(1.0, 101.0)
    answers = answers_for(100, 30, torch.float32)
    answers.add_(Band(11.0, INFINITY), values, 0)

    assert int(answers.filled) == int(answers.counts[0, 1]) == 90
    assert answers.values[:30].tolist() == values[10:40].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("op", [Op.SUM, Op.DOT, Op.LARGEST])
@pytest.mark.parametrize("tail", [0, 1, 77, 4096])
def test_totals_of_blocks_depend_on_no_cut(op: Op, tail: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    numel = 3 * BLOCK + tail
    a, b = (torch.randn(numel, generator=generator, dtype=dtype) for _ in range(2))
    before = a.clone()

    def total(cuts: list[int]) -> list[float]:
        column = torch.zeros(count_blocks(numel), dtype=torch.float64)
        with Watch():
            for begin, end in pairwise([0, *cuts, numel]):
                if begin < end:
                    total_blocks_(
                        op,
                        a[begin:end],
                        b[begin:end],
                        column[begin // BLOCK :][: count_blocks(end - begin)],
                    )
        return column.tolist()

    together = total([])

    assert total([BLOCK, 2 * BLOCK, 3 * BLOCK]) == total([2 * BLOCK]) == together
    assert torch.equal(a, before)
    rows = zip(a.split(BLOCK), b.split(BLOCK), strict=True)
    on_the_cpu = [total_rows(op, x.numpy()[None], y.numpy()[None]).item() for x, y in rows]
    if op is Op.LARGEST:
        assert together == on_the_cpu
    else:
        np.testing.assert_allclose(together, on_the_cpu, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("cutoff", [0, 1, 3])
@pytest.mark.parametrize("threshold", [0.0, 0.5, INFINITY])
def test_a_trim_that_looks_at_nothing_equals_one_that_does(threshold: float, cutoff: int) -> None:
    generator = torch.Generator().manual_seed(2)
    row = torch.randint(-3, 4, (BLOCK,), generator=generator) / 4
    top = TopK(threshold, BLOCK, 10, 1000, 700, cutoff, 100)
    with Watch():
        found = trim_unseen_(row.clone(), top, 1)

    assert torch.equal(found, trim_(row.clone(), top, 1))


class OneRow:
    """A model of one row; see :class:`streammerge.tiles.interpreter.Models`."""

    def __init__(self, row: torch.Tensor) -> None:
        self.row = row

    def source(self, _source: int, out: torch.Tensor) -> None:
        out.copy_(self.row)


def divide(row: torch.Tensor, divisor: float) -> torch.Tensor:
    """Return what the program of a division makes of a row, on the row's device."""
    program = compile_result(Sheet(1, has_base=False).values[0] / divisor)
    found = run_program(
        program,
        OneRow(row),  # type: ignore[arg-type]
        numbers=[number.value for number in program.numbers],
        memory=row.new_empty(count_rows(program), row.numel()),
        row_numel=row.numel(),
    )
    assert found is not None
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@given(divisor=st.floats(1e-6, 1e6))
def test_a_division_rounds_once(divisor: float, dtype: torch.dtype) -> None:
    """On some devices the division by a number is a product with its reciprocal."""
    row = torch.linspace(-3, 3, 1001, dtype=dtype)
    expected = row.numpy() / np.asarray(divisor, dtype=row.numpy().dtype)

    np.testing.assert_array_equal(divide(row, divisor).numpy(), expected)
