"""Kernels that answer questions about ranked values leave what the operations of torch leave.

They run on a device where there is one, and else in Triton's own interpreter, on tensors of the CPU.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_backend import Watch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from triton.runtime import interpreter

from streammerge.engine.accelerator.fused import selecting
from streammerge.engine.accelerator.fused.selecting import add_answers_, write_question
from streammerge.statistics import BLOCK, count_blocks
from streammerge.statistics.in_tensors import ASKED, COUNTS, Answers
from streammerge.statistics.magnitude import BINS, MOST_CROWDS, Band, Bins, Question

HERE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TILE = 2048 if torch.cuda.is_available() else 2**16
"""Triton's interpreter takes as long for a small tile as for a large one."""
BEHIND = 5
"""Places behind all others, where nothing may be written."""
NAN, INFINITY = float("nan"), float("inf")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def bits(value: float, dtype: torch.dtype) -> int:
    integer = torch.int32 if dtype == torch.float32 else torch.int64
    return int(torch.tensor(value, dtype=dtype).view(integer))


def asked(question: Band | tuple[float, float], dtype: torch.dtype) -> Question:
    """Return a question; an interval stands for its bins."""
    if isinstance(question, Band):
        return question
    low, high = (bits(end, dtype) for end in question)
    return Bins(low, high)


def answers_for(blocks: int, limit: int, dtype: torch.dtype) -> Answers:
    """Return answers that nobody has given, with room for so many values."""
    return Answers(
        torch.zeros(blocks, COUNTS, dtype=torch.int64, device=HERE),
        torch.full((limit + 1 + BEHIND,), -1.0, dtype=dtype, device=HERE)[: limit + 1],
        torch.zeros(1, dtype=torch.int64, device=HERE),
        torch.zeros(BINS, dtype=torch.int64, device=HERE),
        torch.arange(BINS + 1, dtype=torch.int32, device=HERE),
    )


def check_answers(
    values: torch.Tensor,
    question: Question,
    *,
    limit: int,
    steps: tuple[int, ...] = (),
    tile: int = TILE,
) -> None:
    """Check the answers about a row, in steps that end at some borders of blocks."""
    blocks = count_blocks(values.numel())
    found, expected = (answers_for(blocks, limit, values.dtype) for _ in range(2))
    told = torch.tensor(write_question(question), device=HERE)
    there = values.to(HERE)
    for begin, end in pairwise([0, *(border * BLOCK for border in steps), values.numel()]):
        step, first = there[begin:end], begin // BLOCK
        # Triton's interpreter computes with numpy, which tells of infinities.
        with Watch(), np.errstate(all="ignore"):
            add_answers_(found, question, told, step, first, tile=tile)
        expected.add_(question, step, first)

    assert torch.equal(found.counts, expected.counts)
    assert torch.equal(found.histogram, expected.histogram)
    assert int(found.filled) == int(expected.filled)
    kept = min(limit, int(found.filled))
    assert torch.equal(found.values[:kept], expected.values[:kept])
    behind = torch.as_strided(found.values, (limit + 1 + BEHIND,), (1,))[kept:]
    assert bool((behind == -1).all())


@cache
def draw_rows(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return a block and a bit, of all kinds."""
    generator = torch.Generator().manual_seed(1)
    numel = BLOCK + 5 * 1024 + 77
    smooth = torch.randn(numel, generator=generator, dtype=dtype).abs()
    few = (torch.randint(-30, 31, (numel,), generator=generator) / 16).abs().to(dtype)
    zeros = smooth.masked_fill(torch.rand(numel, generator=generator) < 0.7, 0.0)
    # Values pile up in one part of each tile, behind smooth ones.
    runs = smooth.clone()
    runs[:BLOCK].view(-1, 512)[:, 256:] = 0.75
    odd = few.clone()
    odd[::7], odd[::1001], odd[5::1003] = smooth[::7], NAN, INFINITY
    return {"smooth": smooth, "few": few, "zeros": zeros, "runs": runs, "odd": odd}


BANDS = [
    Band(0.0, INFINITY),
    Band(0.5, 1.0, (1.0, 0.75)),
    Band(0.5, 0.5, (0.5,)),
    Band(0.5, 0.5),
    Band(0.0, 1.25, (1.25, 1.0, 0.5, 0.0)),
    Band(30.0, 40.0),
    Band(0.5, NAN, (NAN, 0.5)),
]
INTERVALS = [(0.0, INFINITY), (0.5, 1.0), (1.0, 1.0), (0.75, 0.75 + 2**-20), (1.0, INFINITY)]


@DTYPES
@pytest.mark.parametrize("question", [*BANDS, *INTERVALS], ids=str)
@pytest.mark.parametrize("kind", ["smooth", "few", "zeros", "runs", "odd"])
def test_kernels_answer_as_torch_does(
    kind: str, question: Band | tuple[float, float], dtype: torch.dtype
) -> None:
    values = draw_rows(dtype)[kind]

    check_answers(values, asked(question, dtype), limit=values.numel(), steps=(1,))


@DTYPES
@pytest.mark.parametrize("limit", [1, 1000, BLOCK // 3, BLOCK])
@pytest.mark.parametrize("steps", [(), (1,)])
def test_values_without_room_are_counted_and_disturb_nothing(
    steps: tuple[int, ...], limit: int, dtype: torch.dtype
) -> None:
    check_answers(draw_rows(dtype)["odd"], Band(0.5, 1.5, (1.0,)), limit=limit, steps=steps)


SHARED = st.sampled_from([0.0, 2.0**-149, 0.5, 0.75, 1.0, 3.4e38, INFINITY, NAN])
FLOATS = st.floats(0, width=32)


@st.composite
def rows(draw: st.DrawFn) -> tuple[torch.Tensor, Band | tuple[float, float], int, int]:
    """Draw a row with what is asked of it, how much room there is, and the size of tiles."""
    shared = draw(st.lists(st.one_of(SHARED, FLOATS), min_size=1, max_size=12))
    numel = draw(st.integers(1, 5000))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    values = generator.choice(np.array(shared, dtype=np.float32), numel)
    smooth = generator.random(numel) < draw(st.floats(0, 1))
    values[smooth] = np.abs(generator.standard_normal(int(smooth.sum())))
    numbers = [each for each in shared if not math.isnan(each)]
    end = st.one_of(st.sampled_from(numbers or [1.0]), FLOATS)
    low, high = sorted(draw(st.tuples(end, end)))
    crowds = sorted(draw(st.sets(end, max_size=MOST_CROWDS)), reverse=True)
    inside = tuple(each for each in crowds if low <= each <= high)
    question = draw(st.sampled_from([Band(low, high, inside), (low, high)]))
    limit = draw(st.integers(1, numel + 1))
    return torch.from_numpy(values), question, limit, draw(st.sampled_from([512, 1024, 8192]))


@DTYPES
@settings(deadline=None, max_examples=60)
@given(drawn=rows())
def test_any_question_is_answered_as_torch_does(
    drawn: tuple[torch.Tensor, Band | tuple[float, float], int, int], dtype: torch.dtype
) -> None:
    values, question, limit, tile = drawn

    check_answers(values.to(dtype), asked(question, dtype), limit=limit, tile=tile)


def test_more_tiles_than_are_added_at_once() -> None:
    """The place of the first one is found from the numbers of all others."""
    tile, tiles = 32, 600
    values = torch.zeros(tile * tiles)
    values[:: 100 * tile] = torch.arange(1.0, 7.0)

    check_answers(values, Band(1.0, 5.0), limit=10, tile=tile)


@pytest.mark.skipif(torch.cuda.is_available(), reason="looks into Triton's interpreter")
@pytest.mark.parametrize("kind", ["smooth", "few", "zeros", "runs", "odd"])
def test_few_elements_queue_at_one_bin(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One by one, at most 4 % of all are to be added to the same bin, and some for chance."""
    added: list[NDArray[np.uint64]] = []
    original = interpreter.InterpreterBuilder.create_atomic_rmw

    def watched(builder: Any, how: Any, pointers: Any, *rest: Any) -> Any:
        if pointers.data.size > 1:
            added.append(pointers.data[rest[1].data])
        return original(builder, how, pointers, *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_atomic_rmw", watched)
    values = draw_rows(torch.float32)[kind][: 32 * 2048]
    check_answers(values, asked((0.0, INFINITY), torch.float32), limit=1, tile=2048)

    assert len(added) == 32
    together = np.unique(np.concatenate(added), return_counts=True)[1]
    assert together.max(initial=0) < 0.05 * values.numel()


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        (Band(0.5, 1.0, (0.75,)), ["count_band", "collect_inside"]),
        # Nothing is to be collected where a crowd is all there is.
        (Band(0.5, 0.5, (0.5,)), ["count_band"]),
        (Bins(0, 2**20), ["count_bins"]),
    ],
)
def test_a_row_takes_two_kernels_at_most(
    question: Question, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[str] = []
    monkeypatch.setattr(
        selecting, "launch", lambda kernel, *_arguments: launched.append(kernel.__name__)
    )
    told = torch.tensor(write_question(question), device=HERE)
    answers = answers_for(1, 10, torch.float32)
    add_answers_(answers, question, told, torch.ones(100, device=HERE), 0, tile=TILE)

    assert launched == expected


def test_every_question_has_as_many_numbers() -> None:
    crowded = Band(0.0, 1.0, tuple(range(MOST_CROWDS)))
    for question in (None, crowded, Band(0.0, INFINITY), Bins(0, 2**62)):
        assert len(write_question(question)) == ASKED


PROBE = """
import json, re, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from streammerge.engine.accelerator.fused import selecting

TYPES = {"counts": "*i64", "filled": "*i64", "histogram": "*i64", "numbers": "*i32",
         "numel": "i32", "limit": "i32", "TILE": "constexpr"}

def compiled(kernel, rows):
    types = {name: TYPES.get(name, "*" + rows) for name in kernel.arg_names}
    types["asked"] = "*i64" if kernel is selecting.count_bins else "*fp64"
    source = ASTSource(kernel, types, {"TILE": 2048})
    options = {"enable_fp_fusion": False, "num_warps": 4}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]

texts = {}
for kernel, types in (
    (selecting.count_band, ("fp32", "fp64")), (selecting.collect_inside, ("fp32", "fp64")),
    (selecting.count_bins, ("i32", "i64")),
):
    for rows in types:
        texts[f"{kernel.__name__} {rows}"] = compiled(kernel, rows)
found = {name: sorted(set(re.findall(r"^\\t*(?:@%p\\d+ )?((?:atom|red)[.][\\w.:]*)", text, re.M)))
         for name, text in texts.items()}
json.dump(found, sys.stdout)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is there for Linux alone")
def test_compiled_kernels_add_nothing_but_integers_in_any_order(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    run = subprocess.run(
        [sys.executable, "-c", PROBE], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]

    found = {
        name: [set(each.split(".")) for each in own] for name, own in json.loads(run.stdout).items()
    }
    assert len(found) == 6
    for name, atomics in found.items():
        assert all({"add", "u64"} <= each for each in atomics)
        assert bool(atomics) == (not name.startswith("collect_inside"))
