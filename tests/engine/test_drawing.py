"""Rows drawn from other matrices: the same values however the matrix is cut."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from streammerge.checkpoint.bytesource import ByteSourceKind, choose_byte_source
from streammerge.checkpoint.rowmap import RowMap, RowPlace, pack
from streammerge.dtypes import DType
from streammerge.engine.decoding import read_span
from streammerge.floats import narrow
from streammerge.plan.chunking import plan_range
from streammerge.plan.types import TensorInput

TORCH = {
    DType.F64: torch.float64,
    DType.F32: torch.float32,
    DType.F16: torch.float16,
    DType.BF16: torch.bfloat16,
}
ROWS = 9


def stored(directory: Path, columns: int, dtypes: Sequence[DType]) -> list[torch.Tensor]:
    """Write a matrix of each type, behind some bytes that are none of it."""
    generator = torch.Generator().manual_seed(columns)
    made = []
    for index, dtype in enumerate(dtypes):
        matrix = torch.randn(ROWS, columns, generator=generator).to(TORCH[dtype])
        raw = matrix.reshape(-1).view(torch.uint8).numpy().tobytes()
        (directory / f"{index}.bin").write_bytes(b"-" * (8 * index + 8) + raw)
        made.append(matrix)
    return made


def drawn(rows: RowMap, directory: Path, first: int, end: int, places: int) -> NDArray[np.uint8]:
    entry = TensorInput(0, 0, rows.dtype, rows=rows)
    memory = np.zeros((end - first) * rows.dtype.itemsize, np.uint8)
    opener = choose_byte_source(ByteSourceKind.PREAD)
    sources = [opener(directory / f"{index}.bin") for index in range(places)]
    try:
        for span in plan_range(entry, first, end - first):
            read_span(span, sources, memory)
    finally:
        for source in sources:
            source.close()
    return memory


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_rows_are_what_their_origins_hold(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.mktemp("drawn")
    columns = data.draw(st.sampled_from([1, 3, 64, 8200]))
    dtypes = data.draw(st.lists(st.sampled_from(list(TORCH)), min_size=1, max_size=3))
    dtype = data.draw(st.sampled_from(list(TORCH)))
    matrices = stored(directory, columns, dtypes)
    origin = st.tuples(st.integers(0, len(dtypes) - 1), st.integers(0, ROWS - 1))
    origins = data.draw(st.lists(st.lists(origin, max_size=4), min_size=1, max_size=12))
    lengths = np.array([len(each) for each in origins])
    ends = np.cumsum(lengths)
    rows = RowMap(
        columns,
        dtype,
        tuple(RowPlace(i, i, 8 * i + 8, each) for i, each in enumerate(dtypes)),
        pack(ends - lengths),
        pack(ends),
        pack(np.array([pair for each in origins for pair in each]).reshape(-1, 2)),
    )
    expected = []
    for each in origins:
        total = torch.zeros(columns, dtype=torch.float64)
        for place, row in each:
            total += matrices[place][row].double()
        mean = (total / len(each) if len(each) > 1 else total).numpy()
        expected.append(rounded(mean, dtype))
    whole = np.concatenate(expected)
    itemsize = dtype.itemsize
    numel = len(origins) * columns
    first = data.draw(st.integers(0, numel - 1))
    end = data.draw(st.integers(first + 1, numel))

    got = drawn(rows, directory, first, end, len(dtypes))

    assert got.tobytes() == whole[first * itemsize : end * itemsize].tobytes()


def rounded(values: NDArray[np.float64], dtype: DType) -> NDArray[np.uint8]:
    """Return values rounded once: to the nearest that the type has, of two the one whose last bit is 0."""
    kind = TORCH[dtype]
    wide = torch.from_numpy(values)
    if dtype.itemsize > 2:
        return wide.to(kind).view(torch.uint8).numpy()
    # torch rounds twice, by way of float32, and may so miss by one.
    near = wide.to(kind).view(torch.int16)
    near = torch.stack([near - 1, near, near + 1])
    distance = (near.view(kind).double() - wide).abs().nan_to_num(nan=math.inf)
    is_nearest = distance == distance.min(dim=0).values
    order = torch.where(is_nearest, near & 1, 2).argmin(dim=0)
    return near.gather(0, order[None])[0].view(torch.uint8).numpy()


def test_bfloat16_is_rounded_once() -> None:
    """By way of float32 it would be rounded twice: to a tie first, and from there to even."""
    tie = 1 + 2**-8
    values = np.array([tie - 2**-40, tie, tie + 2**-40, -tie - 2**-40, np.inf, -np.inf, 1e300, 0.0])

    got = torch.from_numpy(narrow(values, DType.BF16).view(np.int16)).view(torch.bfloat16)

    step = 2**-7
    expected = [1.0, 1.0, 1 + step, -1 - step, float("inf"), float("-inf"), float("inf"), 0.0]
    assert got.tolist() == expected
    nan = torch.from_numpy(narrow(np.array([np.nan]), DType.BF16).view(np.int16))
    assert nan.view(torch.bfloat16).isnan().all()


def test_rows_side_by_side_are_one_request(tmp_path: Path) -> None:
    (matrix,) = stored(tmp_path, 64, [DType.F32])
    numbers = np.array([3, 4, 5, 0, 1, 8])
    rows = RowMap(
        64,
        DType.F32,
        (RowPlace(0, 0, 8, DType.F32),),
        pack(np.arange(6)),
        pack(np.arange(1, 7)),
        pack(np.stack([np.zeros(6, np.int64), numbers], axis=1)),
    )
    requests: list[tuple[int, int]] = []
    opener = choose_byte_source(ByteSourceKind.PREAD)
    with opener(tmp_path / "0.bin") as source:

        class Counting:
            def read_into(self, offset: int, view: memoryview) -> None:
                requests.append((offset, len(view)))
                source.read_into(offset, view)

        memory = np.zeros(6 * 64 * 4, np.uint8)
        (span,) = plan_range(TensorInput(0, 0, DType.F32, rows=rows), 0, 6 * 64)
        read_span(span, [Counting()], memory)  # type: ignore[list-item]

    assert requests == [(8, 512), (8 + 3 * 256, 768), (8 + 8 * 256, 256)]
    assert memory.tobytes() == matrix[numbers].numpy().tobytes()
