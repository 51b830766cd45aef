"""Micro-benchmarks of the kernels, on one tensor of 4 M elements in memory and one thread.

    python -m pytest benchmarks/test_kernels.py [-k NAME]

Collected only when named. ``--benchmark-compare`` and ``--benchmark-autosave`` compare two states of
the code. Reported are nanoseconds per element of the result: what a core takes to find all that a
method asks about a tensor, and to merge it. Two of them for every element of 1.1B parameters are a
second on two cores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.kernels import BY_ELEMENT, NAME, ROW_NUMEL, Drawn, Merging
from streammerge.dtypes import DType
from streammerge.floats import narrow, widen
from streammerge.native.library import load_kernels
from streammerge.plan.budgeting import values_limit
from streammerge.rng import keep_mask, stream_key
from streammerge.statistics import BLOCK
from streammerge.statistics.magnitude import MagnitudeSearch, answer_block
from streammerge.statistics.topk import TiePolicy, TopK

pytest.importorskip("pytest_benchmark", reason="micro-benchmarks need pytest-benchmark")

SHAPE = (2048, ROW_NUMEL)
NUMEL = SHAPE[0] * ROW_NUMEL
Benchmark = Callable[..., Any]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Measure what one worker does; the engine runs several and gives torch one thread each."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Drawn:
    """A base and its fine-tunes: one tensor each, in bfloat16."""
    return Drawn.at_random(SHAPE, DType.BF16, tmp_path_factory.mktemp("models"))


def report_rate(benchmark: Benchmark) -> None:
    """Add what an element took in the fastest run to the report."""
    stats = getattr(benchmark, "stats", None)
    if stats is not None:
        benchmark.extra_info["ns per element"] = round(stats.stats.min / NUMEL * 1e9, 2)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", BY_ELEMENT)
def test_merge(benchmark: Benchmark, name: str, drawn: Drawn) -> None:
    """The last pass of every method: convert, subtract, check, merge, round."""
    merging = Merging.of(name, drawn)
    found = merging.find()
    out = np.empty_like(drawn.tensors[0])

    benchmark(merging.merge, found, out)

    report_rate(benchmark)


@pytest.mark.parametrize("name", BY_ELEMENT)
def test_find(benchmark: Benchmark, name: str, drawn: Drawn) -> None:
    """All passes before that."""
    merging = Merging.of(name, drawn)
    if not merging.programs.rounds:
        pytest.skip("asks nothing")

    benchmark(merging.find)

    report_rate(benchmark)


@pytest.mark.parametrize("kind", ["differences", "changes", "normal"])
def test_rank_rows(benchmark: Benchmark, kind: str, drawn: Drawn) -> None:
    """Ranks within rows: of differences of two 16-bit types, where most are 0, and where all differ."""
    kernels = load_kernels()
    if kernels is None:
        pytest.skip("no compiler was found at installation")
    base, tuned = (widen(raw, DType.BF16) for raw in drawn.tensors[:2])
    noise = np.random.default_rng(1).standard_normal(NUMEL)
    values = {
        "differences": tuned - base,
        "changes": widen(narrow(base + 5e-5 * noise, DType.BF16), DType.BF16) - base,
        "normal": noise,
    }[kind].astype(np.float32)
    ranks = np.empty_like(values)
    keys = np.empty(2 * ROW_NUMEL, dtype=np.uint64)

    benchmark(
        partial(
            kernels.rank_rows,
            values.ctypes.data,
            rows=SHAPE[0],
            row_numel=ROW_NUMEL,
            ranks=ranks.ctypes.data,
            scratch=keys.ctypes.data,
        )
    )

    report_rate(benchmark)


def test_magnitude_search_concludes(benchmark: Benchmark) -> None:
    """One source's search, from magnitudes that lie in memory, without a sample: by bins alone."""
    magnitudes = np.abs(np.random.default_rng(0).standard_normal(NUMEL, dtype=np.float32))
    masks = np.empty((2, BLOCK), dtype=np.bool_)
    room = np.empty(values_limit(NUMEL), dtype=np.float32)
    spare = np.empty_like(room)

    def search() -> TopK:
        found = MagnitudeSearch(
            numel=NUMEL,
            blocks=NUMEL // BLOCK,
            k=NUMEL // 5,
            tie_policy=TiePolicy.EXACT,
            room=room,
            spare=spare,
        )
        while found.result is None:
            for block, begin in enumerate(range(0, NUMEL, BLOCK)):
                part = magnitudes[begin : begin + BLOCK]
                found.answer(block, answer_block(found.question, part, masks))
            found.conclude()
        return found.result

    top = benchmark(search)

    assert top.threshold == np.partition(magnitudes, NUMEL - top.kept)[NUMEL - top.kept]  # noqa: S101 - a test
    report_rate(benchmark)


def test_random_masks(benchmark: Benchmark) -> None:
    """The keep masks of one source, block by block."""
    key = stream_key(0, 0, NAME)

    def draw() -> int:
        return sum(
            int(np.count_nonzero(keep_mask(key, start, BLOCK, 0.2)))
            for start in range(0, NUMEL, BLOCK)
        )

    kept = benchmark(draw)

    assert abs(kept / NUMEL - 0.2) < 0.001  # noqa: S101 - a test
    report_rate(benchmark)
