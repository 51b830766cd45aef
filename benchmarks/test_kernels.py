"""Micro-benchmarks of the kernels, on one piece of 4 M elements in memory and one thread.

    python -m pytest benchmarks/test_kernels.py

Collected only when named. ``--benchmark-compare`` and ``--benchmark-autosave`` compare two states of
the code. A rate is elements of one model per second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import streammerge
from streammerge.dtypes import DType
from streammerge.engine.asking import Asking
from streammerge.engine.compiled.opening import open_cpu_stage
from streammerge.engine.device import DeviceStage
from streammerge.engine.pieces import Part, PieceInMemory, Stored
from streammerge.engine.scopes import ScopeStatistics
from streammerge.methods import discover_methods
from streammerge.methods.base import MergeMethod
from streammerge.plan.budgeting import values_limit
from streammerge.plan.sweeps import programs_of_plan
from streammerge.plan.types import MergePlan
from streammerge.rng import keep_mask, stream_key
from streammerge.statistics import BLOCK, count_blocks
from streammerge.statistics.magnitude import (
    Band,
    Bins,
    MagnitudeSearch,
    answer_block,
    choose_sample_runs,
)
from streammerge.statistics.rounds import NOTHING, Found
from streammerge.statistics.topk import TiePolicy, TopK, kept_count

pytest.importorskip("pytest_benchmark", reason="micro-benchmarks need pytest-benchmark")

NUMEL = 2**22
SOURCES = 2
ROOM_NUMEL = NUMEL // 8
"""Magnitudes that a search may collect."""
NAME = "weight"
Benchmark = Callable[..., Any]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Measure what one worker does; the engine runs several and gives torch one thread each."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def models() -> list[torch.Tensor]:
    """A base and its fine-tunes: one tensor each, in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(NUMEL, generator=generator).bfloat16()
    tuned = [
        (base + 0.01 * torch.randn(NUMEL, generator=generator)).bfloat16() for _ in range(SOURCES)
    ]
    return [base, *tuned]


@pytest.fixture(scope="module")
def files(models: Sequence[torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same models as files, for the planner."""
    directory = tmp_path_factory.mktemp("models")
    paths = [directory / f"model-{index}.safetensors" for index in range(len(models))]
    for path, tensor in zip(paths, models, strict=True):
        save_file({NAME: tensor}, path)
    return paths


def plan_of(method: MergeMethod, files: Sequence[Path]) -> MergePlan:
    """Return the plan of a merge of these files with a method."""
    recipe: dict[str, Any] = {
        "method": method.name,
        "base": str(files[0]),
        "sources": [
            {"path": str(path), "weight": weight}
            for path, weight in zip(files[1:], (0.6, 0.4), strict=True)
        ],
        "output": {"dtype": "bfloat16"},
    }
    if any(spec.name == "density" for spec in method.parameters):
        recipe["parameters"] = {"density": 0.2}
    return streammerge.plan(recipe, memory="4GiB", workers=1)


def stored(tensor: torch.Tensor) -> Stored:
    """Return a tensor in bfloat16 as a piece holds it."""
    return Stored(tensor.view(torch.uint8).numpy(), DType.BF16)


def piece_of(plan: MergePlan, models: Sequence[torch.Tensor]) -> PieceInMemory:
    """Return the whole tensor as one piece."""
    inputs = tuple(stored(model) for model in models[-len(plan.models) :])
    return PieceInMemory((Part(plan.tasks[0], 0, 0, NUMEL),), inputs)


def find(stage: DeviceStage, piece: PieceInMemory, plan: MergePlan, method: MergeMethod) -> Found:
    """Return all that a method asks, found as the engine finds it: sample, sweep, conclude."""
    statistics = ScopeStatistics(
        programs_of_plan(plan, method)[0],
        numel=piece.numel,
        blocks=count_blocks(piece.numel),
        compute_dtype=DType.F32,
        limit=values_limit(piece.numel),
    )
    while statistics.found is None:
        if statistics.sample_runs:
            runs = choose_sample_runs(piece.numel, statistics.sample_runs)
            statistics.prepare_sample(sum(count for _, count in runs))
            for start, count in runs:
                room = statistics.sample_room(count)
                stage.sample(piece, start, statistics.asking, room)
            statistics.conclude_sample()
        statistics.add(0, stage.measure(piece, statistics.asking))
        statistics.conclude()
    return statistics.found


def report_rate(benchmark: Benchmark) -> None:
    """Add the elements per second of the median run to the report."""
    stats = getattr(benchmark, "stats", None)
    if stats is not None:
        benchmark.extra_info["M elements/s"] = round(NUMEL / stats.stats.median / 1e6)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", sorted(discover_methods()))
def test_apply(
    benchmark: Benchmark, name: str, models: list[torch.Tensor], files: list[Path]
) -> None:
    """The merge of every method: convert, subtract, check, merge, round."""
    method = discover_methods()[name]
    plan = plan_of(method, files)
    piece = piece_of(plan, models)
    stage = open_cpu_stage(plan, method)
    found = find(stage, piece, plan, method)
    out = torch.empty(NUMEL, dtype=torch.bfloat16)

    benchmark(stage.apply, piece, [found], stored(out))

    report_rate(benchmark)


@pytest.mark.parametrize(
    "question", [Band(0.012, 0.0135), Bins(0, 0x7F800000)], ids=["band", "bins"]
)
def test_measure(
    benchmark: Benchmark, question: Band | Bins, models: list[torch.Tensor], files: list[Path]
) -> None:
    """A round: one sweep over the piece with each kind of question, for all sources."""
    method = discover_methods()["ties"]
    plan = plan_of(method, files)
    stage = open_cpu_stage(plan, method)

    asking = Asking(0, NOTHING, (question,) * SOURCES, totals=False)

    benchmark(stage.measure, piece_of(plan, models), asking)

    report_rate(benchmark)


def test_threshold(benchmark: Benchmark, models: list[torch.Tensor], files: list[Path]) -> None:
    """A round as a whole."""
    method = discover_methods()["ties"]
    plan = plan_of(method, files)
    piece = piece_of(plan, models)
    stage = open_cpu_stage(plan, method)

    found = benchmark(find, stage, piece, plan, method)

    assert [top.kept for top in found.tops] == [int(0.2 * NUMEL)] * SOURCES  # noqa: S101 - a test
    report_rate(benchmark)


def test_magnitude_search_concludes(benchmark: Benchmark) -> None:
    """One source's search, from magnitudes that lie in memory, without a sample: by bins alone."""
    magnitudes = np.abs(np.random.default_rng(0).standard_normal(NUMEL, dtype=np.float32))
    masks = np.empty((2, BLOCK), dtype=np.bool_)
    room = np.empty(ROOM_NUMEL, dtype=np.float32)
    spare = np.empty_like(room)

    def search() -> TopK:
        found = MagnitudeSearch(
            numel=NUMEL,
            blocks=NUMEL // BLOCK,
            k=kept_count(0.2, NUMEL),
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
