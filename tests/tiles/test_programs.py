"""What methods write down, compiled and interpreted, is what numpy makes of it step by step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from streammerge import functional
from streammerge.rng import keep_mask, keep_mask_by, stream_key
from streammerge.statistics.in_tensors import total_blocks_
from streammerge.tiles import functions
from streammerge.tiles.compiling import compile_result, compile_sinks
from streammerge.tiles.interpreter import count_rows, run_program
from streammerge.tiles.program import TOTALS, Number, Op, Origin, Program, Vote
from streammerge.tiles.totalling import HostSinks, total_rows
from streammerge.tiles.writing import (
    Factor,
    Row,
    Sheet,
    Sink,
    dot,
    equal,
    exponential,
    exponential_less_one,
    fill,
    in_top,
    keep_largest,
    keep_random,
    largest,
    logarithm,
    logarithm_of_one_more,
    majority_mean,
    maximum,
    minimum,
    ranked,
    sign,
    square_root,
    total,
    weighted_sum,
    where,
)

DTYPES = {"float32": (torch.float32, np.float32), "float64": (torch.float64, np.float64)}
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


# -- compiled


def steps_of(program: Program, *ops: Op) -> list[int]:
    """Return where in a program these are done."""
    return [index for index, step in enumerate(program.steps) if step.op in ops]


@pytest.mark.parametrize("sources", [1, 2, 4, 17, 64, 1000])
def test_a_sum_of_many_models_holds_two_rows_at_a_time(sources: int) -> None:
    sheet = Sheet(sources, has_base=True)
    weights = [0.5 + index for index in range(sources)]
    program = compile_result(sheet.base + weighted_sum(sheet.task_vectors, weights))

    assert program.registers <= 2 + (sources > 1)
    loads = steps_of(program, Op.TASK_VECTOR)
    assert len(loads) == sources
    # Each is used right after it is loaded.
    for load in loads:
        after = program.steps[load + 1]
        assert program.steps[load].out in {after.a, after.b}


def test_trims_and_random_numbers_leave_many_models_at_two_rows() -> None:
    sheet = Sheet(64, has_base=True)
    rows = [
        keep_random(keep_largest(vector, index), index, 0.5) / 0.5
        for index, vector in enumerate(sheet.task_vectors)
    ]
    program = compile_result(sheet.base + weighted_sum(rows, [1.0] * 64))

    assert program.registers <= 3
    assert program.trims == program.streams == tuple(range(64))


def test_a_majority_of_many_models_holds_each_once() -> None:
    sheet = Sheet(64, has_base=True)
    rows = [keep_largest(vector, index) for index, vector in enumerate(sheet.task_vectors)]
    mean = majority_mean(rows, vote=Vote.TOTAL, factors=[1.0] * 64, shares=[1.0] * 64)
    program = compile_result(sheet.base + mean)

    assert program.registers <= 65
    # Trimmed while they are loaded.
    assert not program.uses(Op.KEEP_LARGEST)
    assert [step.c for step in program.steps if step.op is Op.TASK_VECTOR] == list(range(64))


def test_products_of_all_pairs_load_every_model_once() -> None:
    sheet = Sheet(64, has_base=True)
    vectors = sheet.task_vectors
    program = compile_sinks([dot(a, b) for i, a in enumerate(vectors) for b in vectors[: i + 1]])

    assert program.totals == (Op.DOT,) * 2080
    assert len(steps_of(program, Op.TASK_VECTOR)) == program.registers == 64
    assert [program.steps[at].out for at in steps_of(program, Op.DOT)] == list(range(2080))


def test_what_is_used_often_is_computed_once_and_what_is_not_used_never() -> None:
    sheet = Sheet(3, has_base=False)
    first, second, third = sheet.values
    shared = abs(first) + second
    third * 2.0  # nobody wants it
    program = compile_sinks([total(shared), ranked(shared), dot(shared, first * shared)])

    assert Counter(step.op for step in program.steps) == {
        Op.SOURCE: 2, Op.ABSOLUTE: 2, Op.ADD: 1, Op.MULTIPLY: 1, Op.SUM: 1, Op.RANK: 1, Op.DOT: 1,
    }  # fmt: skip


def test_a_vector_that_is_needed_whole_is_not_trimmed_while_it_is_loaded() -> None:
    sheet = Sheet(1, has_base=True)
    (vector,) = sheet.task_vectors
    program = compile_result(keep_largest(vector, 0) + vector)

    assert [step.c for step in program.steps if step.op is Op.TASK_VECTOR] == [-1]
    assert program.uses(Op.KEEP_LARGEST)


def test_one_number_stands_once_in_the_table() -> None:
    sheet = Sheet(2, has_base=False)
    first, second = sheet.values
    found = sheet.number(7)
    program = compile_result((first * 0.5 + second * 0.5) * found + found)

    assert program.numbers == (
        Number(Origin.CONSTANT, 0.5),
        Number(Origin.FOUND, index=7),
    )
    assert program.has_found_numbers
    assert not program.has_row_numbers


def test_trims_and_random_numbers_are_used_once() -> None:
    """They count down while they are used: which tie is the first depends on who asks first."""
    sheet = Sheet(2, has_base=True)
    first, second = sheet.task_vectors

    with pytest.raises(ValueError, match="may use the trim 0 once"):
        compile_result(keep_largest(first, 0) + in_top(second, 0))
    with pytest.raises(ValueError, match="may use the random numbers of source 1 once"):
        compile_result(keep_random(first, 1, 0.5) + keep_random(second, 1, 0.5))


def test_a_long_chain_of_steps_is_no_recursion() -> None:
    (row,) = Sheet(1, has_base=False).values
    for _ in range(20_000):
        row = row + 1.0
    program = compile_result(row)

    assert program.registers == 1
    assert len(program.steps) == 20_002


def test_the_base_is_added_while_the_result_is_stored() -> None:
    sheet = Sheet(1, has_base=True)
    program = compile_result(sheet.base + sheet.task_vectors[0] * 0.5)

    assert not program.uses(Op.ADD)
    assert program.steps[-1].op is Op.STORE
    assert program.steps[-1].b >= 0


# -- interpreted, and what numpy makes of the same expressions


@dataclass
class InMemory:
    """Models in numpy, and what depends on places; see :class:`streammerge.tiles.interpreter.Models`."""

    base_values: np.ndarray
    sources: list[np.ndarray]
    program: Program | None = None
    trims: list[tuple[float, int]] = field(default_factory=lambda: [(1.0, 3), (0.25, 1), (2.0, 0)])
    """A threshold, and how many of its ties are kept, the first."""

    def base(self, out: torch.Tensor) -> None:
        out.copy_(torch.from_numpy(self.base_values))

    def source(self, source: int, out: torch.Tensor) -> None:
        out.copy_(torch.from_numpy(self.sources[source]))

    def task_vector(self, source: int, out: torch.Tensor) -> None:
        out.copy_(torch.from_numpy(self.sources[source] - self.base_values))

    def kept(self, values: np.ndarray, trim: int) -> np.ndarray:
        threshold, ties = self.trims[trim]
        magnitudes = np.abs(values)
        tied = magnitudes == threshold
        return (magnitudes > threshold) | (tied & (np.cumsum(tied) <= ties))

    def trim_(self, row: torch.Tensor, trim: int) -> None:
        row.mul_(torch.from_numpy(self.kept(row.numpy(), self.program.trims[trim])))

    def mark_(self, row: torch.Tensor, trim: int) -> None:
        row.copy_(torch.from_numpy(self.kept(row.numpy(), self.program.trims[trim])))

    def chosen(self, source: int, numel: int, probability: Any) -> np.ndarray:
        key = stream_key(7, source, "tensor")
        if isinstance(probability, np.ndarray):
            return keep_mask_by(key, 0, probability)
        return keep_mask(key, 0, numel, probability)

    def drop_(self, row: torch.Tensor, stream: int, probability: torch.Tensor | float) -> None:
        chance = probability.numpy() if isinstance(probability, torch.Tensor) else probability
        source = self.program.streams[stream]
        row.mul_(torch.from_numpy(self.chosen(source, row.numel(), chance)))


def interpret(
    row: Row, models: InMemory, found: Sequence[Any], *, rows: int = 1
) -> tuple[np.ndarray, Program]:
    """Compile an expression and run it."""
    program = compile_result(row)
    models.program = program
    dtype = torch.from_numpy(models.base_values).dtype
    numel = models.base_values.size
    result = run_program(
        program,
        models,  # type: ignore[arg-type]
        numbers=[
            number.value if number.origin is Origin.CONSTANT else found[number.index]
            for number in program.numbers
        ],
        # What nobody has written yet must not matter.
        memory=torch.full((count_rows(program), numel), float("nan"), dtype=dtype),
        row_numel=numel // rows,
    )
    assert result is not None
    return result.numpy().copy(), program


class InNumpy:
    """Evaluates expressions one after the other, each by its definition."""

    def __init__(self, models: InMemory, found: Sequence[Any], rows: int = 1) -> None:
        self._models = models
        self._found = found
        self._rows = rows
        self._dtype = models.base_values.dtype
        self._known: dict[Row, np.ndarray] = {}

    def value(self, row: Row) -> np.ndarray:
        """Return the values of an expression."""
        if row not in self._known:
            with np.errstate(all="ignore"):
                self._known[row] = np.asarray(self._compute(row), dtype=self._dtype)
        return self._known[row]

    def _number(self, number: Number) -> np.ndarray:
        value = number.value if number.origin is Origin.CONSTANT else self._found[number.index]
        if isinstance(value, np.ndarray):
            value = np.repeat(value, self._models.base_values.size // self._rows)
        return np.asarray(value, dtype=self._dtype)

    def _compute(self, row: Row) -> Any:
        values = [self.value(each) for each in row.rows]
        numbers = [self._number(each) for each in row.numbers]
        if row.op in LOADS:
            return LOADS[row.op](self._models, row.index)
        if row.op in OPERATIONS:
            return OPERATIONS[row.op](*values, *numbers)
        return self._place(row, values, numbers)

    def _place(self, row: Row, values: list[np.ndarray], numbers: list[np.ndarray]) -> Any:
        models, (first, *others) = self._models, values or [models_base(self._models)]
        match row.op:
            case Op.FILL:
                return np.broadcast_to(numbers[0], first.shape)
            case Op.KEEP_LARGEST:
                return first * models.kept(first, row.index)
            case Op.IN_TOP:
                return models.kept(first, row.index)
            case Op.KEEP_RANDOM:
                chance = others[0] if others else row.numbers[0].value
                return first * models.chosen(row.index, first.size, chance)
            case Op.MAJORITY_MEAN:
                return majority_by_definition(row, values, numbers)
        raise AssertionError(row.op)


def models_base(models: InMemory) -> np.ndarray:
    return models.base_values


LOADS: dict[Op, Callable[[InMemory, int], np.ndarray]] = {
    Op.BASE: lambda models, _: models.base_values,
    Op.SOURCE: lambda models, index: models.sources[index],
    Op.TASK_VECTOR: lambda models, index: models.sources[index] - models.base_values,
}
OPERATIONS: dict[Op, Callable[..., Any]] = {
    Op.ADD: np.add,
    Op.SUBTRACT: np.subtract,
    Op.MULTIPLY: np.multiply,
    Op.DIVIDE: np.divide,
    Op.MINIMUM: np.minimum,
    Op.MAXIMUM: np.maximum,
    Op.GREATER: np.greater,
    Op.AT_LEAST: np.greater_equal,
    Op.EQUAL: np.equal,
    Op.ADD_SCALED: lambda a, b, n: a + b * n,
    Op.ABSOLUTE: np.abs,
    Op.SIGN: np.sign,
    Op.SQUARE_ROOT: np.sqrt,
    Op.EXPONENTIAL: lambda a: in_float64(functions.exponential, a),
    Op.LOGARITHM: lambda a: in_float64(functions.logarithm, a),
    Op.EXPONENTIAL_LESS_ONE: lambda a: in_float64(functions.exponential_less_one, a),
    Op.LOGARITHM_OF_ONE_MORE: lambda a: in_float64(functions.logarithm_of_one_more, a),
    Op.SELECT: lambda a, b, c: np.where(c != 0, a, b),
}


def in_float64(function: Callable[..., np.ndarray], values: np.ndarray) -> np.ndarray:
    """Return a function of values, computed in float64 for their own type."""
    return function(values.astype(np.float64), single=values.dtype == np.float32)


def majority_by_definition(
    row: Row, values: list[np.ndarray], numbers: list[np.ndarray]
) -> np.ndarray:
    """Return ``sum_i f_i r_i [r_i s > 0] / sum_i h_i [r_i s > 0]``, from left to right."""
    how, n = row.majority, len(values)
    assert how is not None
    factors, shares, zero_elects = numbers[:n], numbers[n : 2 * n], numbers[2 * n]
    votes = [v if how.vote is Vote.TOTAL else np.sign(v) for v in values]
    ballot = votes[0]
    for vote in votes[1:]:
        ballot = ballot + vote
    elected = np.where(ballot == 0, np.where(zero_elects >= 0, 1, -1), np.sign(ballot))
    added, share = np.zeros_like(values[0]), np.zeros_like(values[0])
    for value, factor, own in zip(values, factors, shares, strict=True):
        agrees = value * elected > 0
        added = added + np.where(agrees, value * factor, 0).astype(value.dtype)
        share = share + np.where(agrees, own, 0).astype(value.dtype)
    return added / np.where(share == 0, 1, share).astype(share.dtype) if how.divides else added


def drawn_models(dtype: str, numel: int = 700, sources: int = 3, seed: int = 0) -> InMemory:
    """Return models of few values and of many: quarters, so that ties and zeros occur."""
    generator = np.random.default_rng(seed)
    made = [
        np.where(
            generator.random(numel) < 0.5,
            generator.integers(-8, 9, numel) / 4,
            generator.standard_normal(numel),
        ).astype(DTYPES[dtype][1])
        for _ in range(sources + 1)
    ]
    return InMemory(made[0], made[1:])


FOUND = (1.5, -0.3, 0.0)

Write = Callable[[Sheet, Row, Row, Row], Row]
WRITTEN: dict[str, Write] = {
    "base": lambda sheet, *_: sheet.base,
    "value": lambda _, a, __, ___: a,
    "task vector": lambda sheet, *_: sheet.task_vectors[1],
    "fill": lambda *_: fill(0.3),
    "sum": lambda _, a, b, __: a + b,
    "sum with a number": lambda _, a, __, ___: a + 0.3,
    "difference": lambda _, a, b, __: a - b,
    "difference to a number": lambda _, a, __, ___: a - 0.3,
    "product": lambda _, a, b, __: a * b,
    "product with a found number": lambda sheet, a, *_: a * sheet.number(1),
    "quotient": lambda _, a, b, __: a / (abs(b) + 0.5),
    "quotient by a number": lambda _, a, __, ___: a / 0.3,
    "minimum": lambda _, a, b, __: minimum(a, b),
    "minimum with a number": lambda _, a, __, ___: minimum(a, 0.25),
    "maximum": lambda _, a, b, __: maximum(a, b),
    "maximum with a number": lambda _, a, __, ___: maximum(a, 0.25),
    "greater": lambda _, a, b, __: a > b,
    "greater than a number": lambda _, a, __, ___: a > 0.25,
    "at least": lambda _, a, b, __: a >= b,
    "at least a number": lambda _, a, __, ___: a >= 0.25,
    "equal": lambda _, a, b, __: equal(a, b),
    "equal to a number": lambda _, a, __, ___: equal(a, 0.25),
    "magnitude": lambda _, a, __, ___: abs(a),
    "sign": lambda _, a, __, ___: sign(a),
    "square root": lambda _, a, __, ___: square_root(abs(a)),
    "exponential": lambda _, a, __, ___: exponential(a * 9.0),
    "exponential less one": lambda _, a, __, ___: exponential_less_one(a),
    "logarithm of one more": lambda _, a, __, ___: logarithm_of_one_more(abs(a)),
    "logarithm": lambda _, a, __, ___: logarithm(abs(a) + 1e-30),
    "choice": lambda _, a, b, c: where(a > b, b, c),
    "weighted sum": lambda _, a, b, c: weighted_sum([a, b, c], [0.3, 1.0, -0.7]),
    "trim": lambda _, a, __, ___: keep_largest(a, 0),
    "trim of a task vector": lambda sheet, *_: keep_largest(sheet.task_vectors[2], 1),
    "top": lambda _, a, b, __: in_top(abs(a) + abs(b), 2),
    "random": lambda _, a, __, ___: keep_random(a, 2, 0.3),
    "random by row": lambda _, a, b, __: keep_random(a, 0, minimum(abs(b), 1.0)),
    "majority by sum": lambda _, *rows: majority_mean(
        rows, vote=Vote.TOTAL, factors=[0.5, 1.0, -2.0], shares=[1.0] * 3
    ),
    "majority by signs": lambda sheet, *rows: majority_mean(
        rows, vote=Vote.FREQUENCY, factors=[sheet.number(0), 1.0, 0.3], shares=[0.5, 1.0, 2.0]
    ),
    "majority that is not divided": lambda _, *rows: majority_mean(
        rows, vote=Vote.TOTAL, factors=[0.5, 1.0, 2.0], shares=None, zero_elects=-1.0
    ),
}  # fmt: skip


@every_dtype
@pytest.mark.parametrize("what", WRITTEN)
@pytest.mark.parametrize("numel", [1, 7, 700])
def test_every_step_is_what_numpy_does(what: str, numel: int, dtype: str) -> None:
    models = drawn_models(dtype, numel)
    sheet = Sheet(3, has_base=True)
    row = WRITTEN[what](sheet, *sheet.values)
    found, _ = interpret(row, models, FOUND)

    assert found.dtype == DTYPES[dtype][1]
    np.testing.assert_array_equal(found, InNumpy(models, FOUND).value(row))


def test_every_step_that_fills_a_register_is_tested() -> None:
    done = set()
    for write in WRITTEN.values():
        sheet = Sheet(3, has_base=True)
        done |= {step.op for step in compile_result(write(sheet, *sheet.values)).steps}

    # Rows within rows and adapters' changes have tests of their own.
    sinks = TOTALS | {Op.RANK}
    assert done == set(Op) - sinks - {Op.COMPUTED, Op.CHANGED}


@every_dtype
def test_numbers_may_differ_from_row_to_row(dtype: str) -> None:
    models = drawn_models(dtype, 600)
    by_row = [np.linspace(-2, 2, 6), np.arange(1.0, 7)]
    sheet = Sheet(3, has_base=True)
    first, second, third = sheet.values
    scale, shift = sheet.row_number(0), sheet.row_number(1)
    rows: list[Row] = [
        first * scale + shift,
        maximum(first, scale) / shift,
        fill(scale) + first,
        weighted_sum([first, second, third], [scale, shift, 0.5]),
        first > scale,
    ]
    for row in rows:
        found, program = interpret(row, models, by_row, rows=6)

        assert program.has_row_numbers
        np.testing.assert_array_equal(found, InNumpy(models, by_row, rows=6).value(row))


@st.composite
def expressions(draw: st.DrawFn) -> Row:
    """Draw a row of rows of rows; some are used again and again."""
    sheet = Sheet(3, has_base=True)
    pool = [sheet.base, *sheet.values, *sheet.task_vectors]
    trims, streams = iter(range(3)), iter(range(3))

    def row() -> Row:
        # From behind: what was computed last is used most.
        return pool[-1 - draw(st.integers(0, len(pool) - 1))]

    def number() -> Factor:
        if draw(st.booleans()):
            return sheet.number(draw(st.integers(0, len(FOUND) - 1)))
        return draw(st.sampled_from([0.0, 1.0, -1.0, 0.3, -2.75]))

    def either() -> Row | Factor:
        return row() if draw(st.booleans()) else number()

    def trimmed() -> Row:
        trim = next(trims, None)
        if trim is None:
            return abs(row())
        return keep_largest(row(), trim) if draw(st.booleans()) else in_top(row(), trim)

    def dropped() -> Row:
        source = next(streams, None)
        if source is None:
            return sign(row())
        by_row = draw(st.booleans())
        return keep_random(row(), source, minimum(abs(row()), 1.0) if by_row else 0.3)

    def averaged() -> Row:
        rows = [row() for _ in range(draw(st.integers(1, 6)))]
        return majority_mean(
            rows,
            vote=draw(st.sampled_from(Vote)),
            factors=[number() for _ in rows],
            shares=draw(st.sampled_from([None, [1.0] * len(rows)])),
            zero_elects=draw(st.sampled_from([1.0, -1.0])),
        )

    def summed() -> Row:
        rows = [row() for _ in range(draw(st.integers(1, 9)))]
        return weighted_sum(rows, [number() for _ in rows])

    kinds: list[Callable[[], Row]] = [
        lambda: row() + either(),
        lambda: row() - either(),
        lambda: row() * either(),
        lambda: row() / (abs(row()) + 0.5),
        lambda: minimum(row(), either()),
        lambda: maximum(row(), either()),
        lambda: row() > either(),
        lambda: row() >= either(),
        lambda: equal(row(), either()),
        lambda: square_root(abs(row())),
        lambda: exponential(minimum(row(), 3.0)),
        lambda: logarithm(abs(row()) + 1e-3),
        lambda: where(row(), row(), row()),
        lambda: fill(number()),
        trimmed,
        dropped,
        averaged,
        summed,
    ]
    for kind in draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=14)):
        pool.append(kind())  # noqa: PERF401 - each draws from those before
    return pool[-1]


@settings(deadline=None, max_examples=300)
@given(row=expressions(), seed=st.integers(0, 99), dtype=st.sampled_from(sorted(DTYPES)))
def test_nested_expressions_are_what_numpy_makes_of_them(row: Row, seed: int, dtype: str) -> None:
    models = drawn_models(dtype, 64, seed=seed)
    plainly = InNumpy(models, FOUND)
    expected = plainly.value(row)
    assume(all(np.isfinite(each).all() for each in plainly._known.values()))
    found, program = interpret(row, models, FOUND)

    np.testing.assert_array_equal(found, expected)
    assert program.registers <= len(program.steps)


# -- what is left behind


@every_dtype
@settings(deadline=None, max_examples=60)
@given(rows=st.lists(expressions(), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_totals_and_ranks_are_of_the_rows_that_they_ask_about(
    dtype: str, rows: list[Row], seed: int
) -> None:
    """Each of several expressions, drawn one by one, in a program of its own and in one of all."""
    models = drawn_models(dtype, 99, seed=seed)
    plainly = InNumpy(models, FOUND)
    values = [plainly.value(row) for row in rows]
    assume(all(np.isfinite(each).all() for each in plainly._known.values()))
    for row, value in zip(rows, values, strict=True):
        sinks: list[Sink] = [total(row), largest(row), dot(row, row), ranked(row)]
        totals, offered, program = leave(sinks, models)

        assert program.totals == (Op.SUM, Op.LARGEST, Op.DOT)
        assert program.ranked == 1
        expected = [total_rows(op, value[None], value[None])[0] for op in program.totals]
        np.testing.assert_array_equal(totals, expected)
        np.testing.assert_array_equal(offered[0], np.abs(value))


def leave(sinks: list[Sink], models: InMemory) -> tuple[np.ndarray, dict[int, np.ndarray], Program]:
    """Run what totals and ranks; return totals, ranked values and the program."""
    program = compile_sinks(sinks)
    models.program = program
    offered: dict[int, np.ndarray] = {}
    taking = HostSinks(program, lambda at, row: offered.update({at: row.numpy().copy()}))
    memory = torch.empty(
        count_rows(program),
        models.base_values.size,
        dtype=torch.from_numpy(models.base_values).dtype,
    )
    run_program(
        program,
        models,  # type: ignore[arg-type]
        numbers=[
            n.value if n.origin is Origin.CONSTANT else FOUND[n.index] for n in program.numbers
        ],
        memory=memory,
        row_numel=memory.shape[1],
        sinks=taking,
    )
    return taking.totals[0], offered, program


@pytest.mark.parametrize("numel", [1, 15, 16, 17, 262_144, 262_145])
def test_totals_are_sums_to_the_last_places_of_float64(numel: int) -> None:
    generator = np.random.default_rng(numel)
    a, b = generator.standard_normal((2, 2, numel)).astype(np.float32)
    exact = (a.astype(np.longdouble) * b).sum(axis=1)
    size = (np.abs(a.astype(np.longdouble) * b)).sum(axis=1)

    assert (np.abs(total_rows(Op.DOT, a, b) - exact) <= 1e-13 * size).all()
    assert (total_rows(Op.LARGEST, a, b) == a.max(axis=1)).all()


def test_counts_are_of_elements_that_are_not_zero_and_of_opposite_signs() -> None:
    a = np.array([[1.0, -0.0, 0.0, -2.0, 3.0, 1e-45, -1.0]], dtype=np.float32)
    b = np.array([[-1.0, 5.0, 0.0, 2.0, 4.0, -1e-45, -3.0]], dtype=np.float32)

    found = [
        total_rows(Op.COUNT, a, None),
        total_rows(Op.COUNT, a, b),
        total_rows(Op.OPPOSED, a, b),
    ]

    assert [each.tolist() for each in found] == [[5.0], [5.0], [3.0]]
    for op, expected in ((Op.COUNT, 5.0), (Op.OPPOSED, 3.0)):
        column = torch.zeros(1, dtype=torch.float64)
        total_blocks_(op, torch.from_numpy(a[0]), torch.from_numpy(b[0]), column)
        assert column.tolist() == [expected]


def test_totals_of_what_is_not_finite_come_without_a_warning() -> None:
    row = np.array([[np.inf, -np.inf, 1.0]])

    assert np.isnan(total_rows(Op.DOT, row, np.zeros((1, 3))))
    assert np.isnan(total_rows(Op.SUM, row, row))
    assert total_rows(Op.LARGEST, row, row) == np.inf


# -- steps of methods, and the functions that they follow


@every_dtype
@pytest.mark.parametrize("sources", range(1, 10))
def test_a_weighted_sum_is_added_from_left_to_right(sources: int, dtype: str) -> None:
    """Which is what torch does with up to four rows."""
    models = drawn_models(dtype, 999, sources)
    weights = [0.1 * index - 0.25 for index in range(sources)]
    row = weighted_sum(Sheet(sources, has_base=True).values, weights)
    found, _ = interpret(row, models, FOUND)

    number = DTYPES[dtype][1]
    expected = np.zeros_like(found)
    for source, weight in zip(models.sources, weights, strict=True):
        expected = expected + source * number(weight)
    np.testing.assert_array_equal(found, expected)
    assert not np.signbit(found[found == 0]).any()
    if sources <= 4:
        tensors = [torch.from_numpy(each) for each in models.sources]
        column = torch.tensor(weights, dtype=DTYPES[dtype][0])
        assert torch.equal(torch.from_numpy(found), functional.task_arithmetic(tensors, column))


@every_dtype
@pytest.mark.parametrize("vote", ["total", "frequency"])
@pytest.mark.parametrize("sources", range(1, 5))
def test_a_majority_is_elected_and_averaged_as_in_memory(
    sources: int, vote: str, dtype: str
) -> None:
    models = drawn_models(dtype, 999, sources)
    weights = [0.5 - 0.4 * index for index in range(sources)]
    row = majority_mean(
        Sheet(sources, has_base=True).values,
        vote=Vote[vote.upper()],
        factors=weights,
        shares=[1.0] * sources,
    )
    found, _ = interpret(row, models, FOUND)

    stack = torch.stack([torch.from_numpy(each) for each in models.sources])
    mask = functional.calculate_majority_sign_mask(stack, vote)  # type: ignore[arg-type]
    column = torch.tensor(weights, dtype=DTYPES[dtype][0])[:, None]
    expected = functional.disjoint_merge(stack * column, mask)
    assert torch.equal(torch.from_numpy(found), expected)
    assert not np.signbit(found[found == 0]).any()


@every_dtype
def test_a_division_by_a_density_rounds_once(dtype: str) -> None:
    """A product with the reciprocal would round twice."""
    models = drawn_models(dtype, 999, 1)
    for density in (0.1, 0.3, 0.7, 1 / 3):
        row = keep_random(Sheet(1, has_base=True).values[0], 0, density) / density
        found, _ = interpret(row, models, FOUND)
        kept = models.sources[0] * models.chosen(0, 999, density)

        np.testing.assert_array_equal(found, kept / DTYPES[dtype][1](density))
