"""Programs drawn at random, models for them, and how the interpreter and the machine run them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from hypothesis import strategies as st
from numpy.typing import NDArray

from streammerge.native.library import Kernels
from streammerge.native.machine import ALL_TIES, Asked, EncodedProgram, Jobs, RoomCall
from streammerge.rng import LANES_PER_COUNTER, keep_limit, random_lanes, stream_key
from streammerge.tiles.compiling import compile_result, compile_sinks
from streammerge.tiles.interpreter import count_rows, run_program
from streammerge.tiles.program import Op, Origin, Program, Vote
from streammerge.tiles.totalling import HostSinks
from streammerge.tiles.writing import (
    Factor,
    Row,
    Sheet,
    Sink,
    count,
    count_both,
    count_opposed,
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

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""In the order of the kernels' codes."""
COMPUTED = 2
"""Rows that were computed before."""
FOUND = 3
"""Numbers that statistics have found, in all and in every row."""


@dataclass(frozen=True)
class Trim:
    """What a trim keeps in one job."""

    threshold: float
    ties: int
    everything: bool


@dataclass
class ModelsInMemory:
    """What one job reads; a twin of what the machine is told, in plain numpy."""

    base_values: torch.Tensor
    sources: Sequence[torch.Tensor]
    computed_rows: Sequence[torch.Tensor]
    trims: Sequence[Trim]
    keys: Sequence[int] = field(repr=False)
    start: int
    kept: list[int] = field(default_factory=list)

    def base(self, out: torch.Tensor) -> None:
        out.copy_(self.base_values)

    def source(self, source: int, out: torch.Tensor) -> None:
        out.copy_(self.sources[source])

    def task_vector(self, source: int, out: torch.Tensor) -> None:
        out.copy_(self.sources[source]).sub_(self.base_values.float())

    def computed(self, index: int, out: torch.Tensor) -> None:
        out.copy_(self.computed_rows[index])

    def change_(self, row: torch.Tensor, source: int) -> None:
        raise AssertionError("no adapter here")

    def trim_(self, row: torch.Tensor, trim: int) -> None:
        row.masked_fill_(torch.from_numpy(~self._kept_by(row, trim)), 0.0)

    def mark_(self, row: torch.Tensor, trim: int) -> None:
        row.copy_(torch.from_numpy(self._kept_by(row, trim)))

    def _kept_by(self, row: torch.Tensor, trim: int) -> NDArray[np.bool_]:
        spec = self.trims[trim]
        magnitudes = row.abs().numpy().view(np.int32)
        threshold = np.float32(spec.threshold).view(np.int32)
        ties = magnitudes == threshold
        kept = (magnitudes > threshold) | (ties & (np.cumsum(ties) <= spec.ties)) | spec.everything
        self.kept.append(int(np.count_nonzero(kept)))
        return np.asarray(kept)

    def drop_(self, row: torch.Tensor, source: int, probability: torch.Tensor | float) -> None:
        numbers = random_numbers(self.keys[source], self.start, row.numel())
        if isinstance(probability, torch.Tensor):
            limits = np.rint(np.float64(probability.numpy()) * 2**32)
        else:
            limits = np.full(row.numel(), keep_limit(probability), dtype=np.float64)
        kept = numbers.astype(np.float64) < limits
        self.kept.append(int(np.count_nonzero(kept)))
        row.masked_fill_(torch.from_numpy(~kept), 0.0)


def random_numbers(key: int, start: int, count: int) -> NDArray[np.int64]:
    """Return the 32-bit numbers of elements, ``[count]``."""
    before = start % LANES_PER_COUNTER
    upper, lower = (
        random_lanes(each, start - before, count + before)[before:].astype(np.int64)
        for each in (key, key ^ 1)
    )
    return upper << 16 | lower


@dataclass(frozen=True)
class Case:
    """A program, and several jobs that run it."""

    program: Program
    has_base: bool
    jobs: list[ModelsInMemory]
    found: list[float]
    row_found: list[NDArray[np.float64]]
    """``[rows, FOUND]`` per job."""
    row_numel: list[int]
    out: torch.dtype

    @property
    def n_sources(self) -> int:
        return len(self.jobs[0].sources)


NUMBERS = (0.0, -0.0, 1.0, -1.0, 0.5, 0.3, -2.75, 1e-3, 1e30, 3e-39)


@st.composite
def expressions(draw: st.DrawFn, sheet: Sheet, *, row_by_row: bool = True) -> list[Row]:
    """Draw rows that use each other; each is used by some, or by none."""
    pool = [*sheet.values]
    if row_by_row:
        pool += [sheet.computed(index) for index in range(COMPUTED)]
    if sheet.has_base:
        pool += [sheet.base, *sheet.task_vectors, *sheet.task_vectors]
    trims, streams = iter(range(100)), iter(range(sheet.sources))

    def row() -> Row:
        # From behind: what was computed last is used most.
        return pool[-1 - min(draw(st.integers(0, len(pool) - 1)), len(pool) - 1)]

    def number() -> Factor:
        kind = draw(st.integers(0, 5))
        if kind == 0:
            return sheet.number(draw(st.integers(0, FOUND - 1)))
        if kind == 1 and row_by_row:
            return sheet.row_number(draw(st.integers(0, FOUND - 1)))
        return draw(st.sampled_from(NUMBERS))

    def either() -> Row | Factor:
        return row() if draw(st.booleans()) else number()

    def averaged() -> Row:
        rows = [row() for _ in range(draw(st.integers(1, 7)))]
        shares = draw(st.sampled_from(["none", "ones", "any"]))
        return majority_mean(
            rows,
            vote=draw(st.sampled_from(Vote)),
            factors=[number() for _ in rows],
            shares={"none": None, "ones": [1.0] * len(rows)}.get(shares, [number() for _ in rows]),
            zero_elects=draw(st.sampled_from([1.0, 0.0, -1.0, sheet.number(0)])),
        )

    def at_random() -> Row:
        source = next(streams, None)
        if source is None:
            return row() + 1.0
        chance = draw(st.sampled_from([0.0, 0.25, 0.7, 1e-5, 1.0, 3e-10]))
        return keep_random(row(), source, row() if row_by_row and draw(st.booleans()) else chance)

    def summed() -> Row:
        rows = [row() for _ in range(draw(st.integers(1, 4)))]
        return weighted_sum(rows, [number() for _ in rows])

    kinds: list[Callable[[], Row]] = [
        lambda: row() + either(),
        lambda: row() - either(),
        lambda: row() * either(),
        lambda: row() / either(),
        lambda: minimum(row(), either()),
        lambda: maximum(row(), either()),
        lambda: row() > either(),
        lambda: row() >= either(),
        lambda: equal(row(), either()),
        lambda: abs(row()),
        lambda: sign(row()),
        lambda: square_root(abs(row())),
        lambda: exponential(row()),
        lambda: logarithm(maximum(abs(row()), 1e-30)),
        lambda: exponential_less_one(row()),
        lambda: logarithm_of_one_more(maximum(row(), -0.75)),
        lambda: where(row(), row(), row()),
        lambda: fill(number()),
        lambda: keep_largest(row(), next(trims)),
        lambda: in_top(row(), next(trims)),
        averaged,
        at_random,
        summed,
    ]
    for kind in draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=16)):
        pool.append(kind())
    return pool


@st.composite
def programs(draw: st.DrawFn, *, sources: int, has_base: bool, row_by_row: bool = True) -> Program:
    """Draw a program that stores a result, or one that totals and ranks."""
    sheet = Sheet(sources, has_base)
    pool = draw(expressions(sheet, row_by_row=row_by_row))
    if draw(st.booleans()):
        return compile_result(
            sheet.base + pool[-1] if has_base and draw(st.booleans()) else pool[-1]
        )
    some = st.sampled_from(pool[-6:])
    sinks: list[Sink] = []
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.integers(0, 6))
        sinks.append(
            (dot, count_both, count_opposed)[kind](draw(some), draw(some))
            if kind < 3
            else (total, largest, ranked, count)[kind - 3](draw(some))
        )
    return compile_sinks(sinks)


@st.composite
def cases(draw: st.DrawFn, *, row_by_row: bool = True) -> Case:
    """Draw a program and what it runs on; also one that needs to know of rows, if so asked."""
    sources, has_base = draw(st.integers(1, 4)), draw(st.booleans())
    program = draw(programs(sources=sources, has_base=has_base, row_by_row=row_by_row))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    jobs, row_found, row_numel = [], [], []
    for _ in range(draw(st.integers(1, 3))):
        per_row, rows = draw(
            st.sampled_from(
                [(1, 1), (7, 1), (512, 1), (1300, 1), (0, 1), (16, 5), (37, 6), (600, 3)]
            )
        )
        numel = per_row * rows
        huge = draw(st.integers(0, 3)) == 0
        dtypes = [draw(st.sampled_from(DTYPES)) for _ in range(sources + 1)]
        base, *tuned = [draw_values(numel, dtype, generator, huge=huge) for dtype in dtypes]
        trims = [
            Trim(
                draw(st.sampled_from([0.0, 0.5, 1.0, 2.0, float("inf")])),
                draw(st.sampled_from([0, 1, 20, ALL_TIES])),
                draw(st.integers(0, 4)) == 0,
            )
            for _ in program.trims
        ]
        computed = [torch.rand(numel, generator=generator) for _ in range(COMPUTED)]
        keys = [stream_key(3, source, "w") for source in range(sources)]
        start = draw(st.sampled_from([0, 65536, 48, 5, 2**33 + 1]))
        jobs.append(ModelsInMemory(base, tuned, computed, trims, keys, start))
        row_found.append(torch.randn((rows, FOUND), generator=generator).numpy().astype(np.float64))
        row_numel.append(per_row)
    found = [draw(st.sampled_from(NUMBERS)) for _ in range(FOUND)]
    out = draw(st.sampled_from(DTYPES))
    return Case(program, has_base, jobs, found, row_found, row_numel, out)


def draw_values(
    numel: int, dtype: torch.dtype, generator: torch.Generator, *, huge: bool
) -> torch.Tensor:
    """Return finite values: many alike, zeros of both signs, very small and very large ones."""
    values = torch.randn(numel, generator=generator)
    kind = torch.randint(0, 12, (numel,), generator=generator)
    values = torch.where(kind < 5, values.round(), values)
    values = torch.where(kind == 5, -0.0, values)
    values = torch.where(kind == 6, values * 1e-41, values)
    if huge:
        values = torch.where(kind == 7, values * 1e37, values)
    values = values.to(dtype)
    return torch.where(values.isfinite(), values, 1.0)


@dataclass
class Outcome:
    """What a run leaves behind."""

    result: torch.Tensor | None
    totals: NDArray[np.float64]


@dataclass
class Ran:
    """What a job came to."""

    outcome: Outcome
    ranked: list[NDArray[np.float32]]
    kept: list[int]
    refused: bool


def interpret(case: Case, index: int) -> Ran:
    """Run a job by the interpreter."""
    models = case.jobs[index]
    program = case.program
    models.kept.clear()
    ranked_rows: dict[int, NDArray[np.float32]] = {}
    rows = case.row_found[index]
    numbers: list[float | NDArray[np.float64]] = []
    for number in program.numbers:
        if number.origin is Origin.CONSTANT:
            numbers.append(number.value)
        else:
            by_row = number.origin is Origin.ROW
            numbers.append(rows[:, number.index] if by_row else case.found[number.index])
    numel = models.base_values.numel()
    with np.errstate(all="ignore"):
        sinks = HostSinks(
            program,
            lambda which, row: ranked_rows.update({which: row.numpy().copy()}),
            rows=numel // case.row_numel[index] if case.row_numel[index] else 1,
        )
        result = run_program(
            program,
            _Renumbered(models, program),
            numbers=numbers,
            memory=torch.empty(count_rows(program), numel),
            row_numel=case.row_numel[index],
            sinks=sinks,
        )
    outcome = Outcome(result, sinks.totals)
    refused = any(not bool(values.isfinite().all()) for values in _loaded(case, index))
    if outcome.result is not None:
        fits = outcome.result.abs() <= torch.finfo(case.out).max
        refused |= not bool(fits.all())
    kept = models.kept.copy()
    return Ran(outcome, [ranked_rows[k] for k in range(program.ranked)], kept, refused)


class _Renumbered:
    """Models whose trims are those that the program uses, in its order."""

    def __init__(self, models: ModelsInMemory, program: Program) -> None:
        self._models, self._program = models, program

    def __getattr__(self, name: str) -> object:
        return getattr(self._models, name)

    def drop_(self, row: torch.Tensor, stream: int, probability: torch.Tensor | float) -> None:
        self._models.drop_(row, self._program.streams[stream], probability)


def _loaded(case: Case, index: int) -> list[torch.Tensor]:
    """Return everything that the program loads."""
    models = case.jobs[index]
    rows = []
    for step in case.program.steps:
        row = torch.empty(models.base_values.numel())
        if step.op is Op.SOURCE:
            models.source(step.a, row)
        elif step.op is Op.TASK_VECTOR:
            models.task_vector(step.a, row)
        else:
            continue
        rows.append(row)
    return rows


def run_by_machine(kernels: Kernels, case: Case) -> list[Ran]:
    """Run all jobs by the compiled machine, at once."""
    program = case.program
    encoded = EncodedProgram(program, sources=case.n_sources, has_base=case.has_base)
    jobs = Jobs([encoded], len(case.jobs))
    keep_alive, outs, totals = [], [], []
    for index, models in enumerate(case.jobs):
        numel, rows = models.base_values.numel(), len(case.row_found[index])
        tensors = [models.base_values] if case.has_base else []
        tensors += [*models.sources, *models.computed_rows]
        operands = [
            part for each in tensors for part in (each.data_ptr(), DTYPES.index(each.dtype))
        ][: 2 * encoded.operands]
        numbers = encoded.numbers(case.found, case.row_found[index])
        outs.append(torch.empty(numel, dtype=case.out))
        totals.append(np.full((rows, len(program.totals)), np.nan))
        keep_alive.append(numbers)
        jobs.fill(
            index,
            encoded,
            operands,
            numel=numel,
            row_numel=case.row_numel[index],
            numbers=numbers.ctypes.data,
            out=outs[-1].data_ptr(),
            out_code=DTYPES.index(case.out),
            limit=torch.finfo(case.out).max,
            totals=totals[-1].ctypes.data,
        )
        for trim in range(len(program.trims)):
            spec = models.trims[trim]
            jobs.trim(index, trim, spec.threshold, ties=spec.ties, everything=spec.everything)
        for stream, source in enumerate(program.streams):
            limit = keep_limit(chance_of(case, stream) or 0.0)
            jobs.draw(index, stream, models.keys[source], start=models.start, limit=limit)
        for asked in jobs.asked[index]:
            asked.kind = Asked.KEEP
    memory = np.full(encoded.memory_numel + 1, np.nan, dtype=np.float32)
    room = np.empty(
        sum(each.base_values.numel() for each in case.jobs) * program.ranked, np.float32
    )
    room_call = RoomCall(room.ctypes.data, room.size)
    count = kernels.run(jobs.calls, 0, len(case.jobs), memory=memory.ctypes.data, room=room_call)
    assert room_call.done == len(case.jobs)
    assert np.isnan(memory[-1]), "it wrote behind its memory"
    refused = [bool(jobs.calls[index].refused) for index in range(len(case.jobs))]
    assert count == sum(refused)
    return [
        Ran(
            Outcome(outs[i], totals[i]),
            [room[each.first : each.first + each.collected] for each in jobs.asked[i]],
            _kept(program, jobs, i),
            refused[i],
        )
        for i in range(len(case.jobs))
    ]


def chance_of(case: Case, stream: int) -> float | None:
    """Return the probability that a stream's step has as a number; None if it has it by element."""
    for step in case.program.steps:
        if step.op is Op.KEEP_RANDOM and step.c == stream:
            return case.program.numbers[step.number].value if step.b < 0 else None
    raise AssertionError("no step draws from the stream")


def _kept(program: Program, jobs: Jobs, index: int) -> list[int]:
    """Return what was kept, in the order of the steps."""
    kept = []
    for step in program.steps:
        if step.op is Op.KEEP_RANDOM:
            kept.append(jobs.streams[index][step.c].kept)
        elif step.op in (Op.KEEP_LARGEST, Op.IN_TOP) or (step.op is Op.TASK_VECTOR and step.c >= 0):
            kept.append(jobs.trims[index][step.c].kept)
    return kept
