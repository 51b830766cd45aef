"""Questions about ranked values are answered as numpy answers them, however many at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from streammerge.native.library import load_kernels
from streammerge.native.machine import (
    CRAMMED,
    MOST_CROWDS,
    Asked,
    AskedCall,
    EncodedProgram,
    Jobs,
    RoomCall,
)
from streammerge.tiles.compiling import compile_sinks
from streammerge.tiles.writing import Sheet, ranked

KERNELS = load_kernels()
pytestmark = pytest.mark.skipif(KERNELS is None, reason="no compiler was found at installation")
SOURCES = 3
BINS = 2**16
Floats = NDArray[np.float32]


def encode() -> EncodedProgram:
    sheet = Sheet(SOURCES, has_base=True)
    program = compile_sinks([ranked(each) for each in sheet.task_vectors])
    return EncodedProgram(program, sources=SOURCES, has_base=True)


@dataclass
class Setup:
    """Some jobs that ask about task vectors."""

    jobs: Jobs
    program: EncodedProgram
    models: list[Floats]
    """``[base, *sources]``."""
    begins: list[int]

    def magnitudes(self, job: int, source: int) -> Floats:
        part = slice(self.begins[job], self.begins[job + 1])
        found: Floats = np.abs(self.models[1 + source][part] - self.models[0][part])
        return found

    def run(self, room: Floats, first: int, count: int) -> int:
        """Run jobs from one on; return how many were done."""
        assert KERNELS is not None
        memory = np.empty(self.program.memory_numel, dtype=np.float32)
        call = RoomCall(room.ctypes.data, room.size)
        KERNELS.run(self.jobs.calls, first, count, memory=memory.ctypes.data, room=call)
        return int(call.done)


def set_up(sizes: list[int], seed: int, *, spread: bool) -> Setup:
    generator = np.random.default_rng(seed)
    begins = np.cumsum([0, *sizes]).tolist()
    models = [generator.standard_normal(begins[-1], dtype=np.float32) for _ in range(SOURCES + 1)]
    if not spread:
        models = [np.round(each * 2) for each in models]
    program = encode()
    jobs = Jobs([program], len(sizes))
    for index, begin in enumerate(begins[:-1]):
        operands = [part for each in models for part in (each.ctypes.data + 4 * begin, 0)]
        jobs.fill(index, program, operands, numel=sizes[index])
    return Setup(jobs, program, models, begins)


def bits_of(value: float) -> int:
    return int(np.float32(value).view(np.int32))


def ask(call: AskedCall, kind: Asked, magnitudes: Floats, draw: st.DrawFn) -> NDArray[np.int64]:
    """Ask about an interval whose ends are values that occur, as a rule; return its histogram."""
    call.kind, call.n_crowded, call.shift = kind, 0, 16
    ends = st.sampled_from([0.0, float("inf"), *np.unique(magnitudes)[:50].tolist()])
    low, high = sorted((draw(ends), draw(ends)))
    call.low, call.high = bits_of(low), bits_of(high)
    call.k = draw(st.integers(1, max(1, magnitudes.size)))
    if magnitudes.size == 0 and kind is Asked.SELECT:
        call.kind = Asked.KEEP
    inside = np.unique(magnitudes[(magnitudes >= low) & (magnitudes <= high)])[:MOST_CROWDS]
    for crowd in inside[: draw(st.integers(0, MOST_CROWDS))]:
        call.crowded[call.n_crowded] = bits_of(crowd)
        call.n_crowded += 1
    histogram = np.zeros(BINS, dtype=np.int64)
    call.histogram = histogram.ctypes.data
    return histogram


def check(call: AskedCall, magnitudes: Floats, room: Floats, histogram: NDArray[np.int64]) -> None:
    """Compare an answer with numpy's."""
    bits = magnitudes.view(np.int32)
    inside = bits[(bits >= call.low) & (bits <= call.high)]
    crowded = list(call.crowded)[: call.n_crowded]
    found = room[call.first : call.first + call.collected]
    if call.kind in (Asked.BAND, Asked.BINS):
        assert call.above == np.count_nonzero(bits > call.high)
        assert call.largest == bits.max(initial=0)
    if call.kind == Asked.BAND:
        assert list(call.crowds)[: call.n_crowded] == [np.count_nonzero(bits == c) for c in crowded]
        np.testing.assert_array_equal(found.view(np.int32), inside[~np.isin(inside, crowded)])
    elif call.kind == Asked.BINS:
        bins = np.bincount((inside - call.low) >> call.shift, minlength=BINS)
        np.testing.assert_array_equal(histogram, bins)
    elif call.kind == Asked.KEEP:
        np.testing.assert_array_equal(found, magnitudes)
    elif call.kind == Asked.SELECT:
        threshold = np.sort(magnitudes)[-call.k]
        assert call.threshold == threshold
        assert call.above == np.count_nonzero(magnitudes > threshold)
        assert call.equal == np.count_nonzero(magnitudes == threshold)


@settings(deadline=None, max_examples=200)
@given(
    data=st.data(),
    sizes=st.lists(st.integers(0, 1500), min_size=1, max_size=4),
    seed=st.integers(0, 99),
    spread=st.booleans(),
    room_share=st.sampled_from([1.0, 0.3, 0.05]),
)
def test_any_mixture_of_questions_is_answered_as_numpy_does(
    *, data: st.DataObject, sizes: list[int], seed: int, spread: bool, room_share: float
) -> None:
    """What there is no room for is asked again, alone."""
    setup = set_up(sizes, seed, spread=spread)
    room = np.empty(max(*sizes, int(sum(sizes) * SOURCES * room_share)), dtype=np.float32)
    asked = setup.jobs.asked
    kinds = [[data.draw(st.sampled_from(Asked)) for _ in range(SOURCES)] for _ in sizes]
    draw = data.draw
    histograms = [
        [ask(asked[j][s], kinds[j][s], setup.magnitudes(j, s), draw) for s in range(SOURCES)]
        for j in range(len(sizes))
    ]

    first = 0
    while first < len(sizes):
        done = setup.run(room, first, len(sizes) - first)
        assert done > 0
        for job in range(first, first + done):
            crammed = [s for s in range(SOURCES) if asked[job][s].collected == CRAMMED]
            assert not crammed or job == first + done - 1
            for source in set(range(SOURCES)) - set(crammed):
                magnitudes = setup.magnitudes(job, source)
                check(asked[job][source], magnitudes, room, histograms[job][source])
        first += done
        for source in crammed:
            alone = kinds[first - 1][source]
            for each in range(SOURCES):
                asked[first - 1][each].kind = alone if each == source else Asked.NOTHING
            setup.run(room, first - 1, 1)
            magnitudes = setup.magnitudes(first - 1, source)
            assert asked[first - 1][source].collected >= 0
            check(asked[first - 1][source], magnitudes, room, histograms[first - 1][source])


def test_what_nothing_asks_about_is_not_loaded() -> None:
    setup = set_up([1000], 0, spread=True)
    setup.models[2][500] = np.nan
    for source in range(SOURCES):
        setup.jobs.asked[0][source].kind = Asked.KEEP if source != 1 else Asked.NOTHING

    setup.run(np.empty(2000, dtype=np.float32), 0, 1)

    assert not setup.jobs.calls[0].refused
    setup.jobs.asked[0][1].kind = Asked.BINS
    setup.jobs.asked[0][1].low, setup.jobs.asked[0][1].high = 1, 0
    setup.run(np.empty(2000, dtype=np.float32), 0, 1)
    assert setup.jobs.calls[0].refused


def test_magnitudes_that_only_a_rank_needs_are_not_computed() -> None:
    sheet = Sheet(1, has_base=True)
    (vector,) = sheet.task_vectors
    alone = EncodedProgram(compile_sinks([ranked(vector)]), sources=1, has_base=True)
    assert alone.n_steps == 2
