"""Codes and scales equal torch's conversions of whole tensors, bit for bit, however a tensor is cut."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streammerge.assignment.types import Action
from streammerge.checkpoint.types import Encoding
from streammerge.dtypes import DType
from streammerge.engine.decoding import code_table, widen_scales
from streammerge.engine.encoding import TensorScales, encode_values, find_scales
from streammerge.errors import NonFiniteError
from streammerge.plan.types import TensorTask

CODES = {DType.F8_E4M3: torch.float8_e4m3fn, DType.F8_E5M2: torch.float8_e5m2}
LARGEST = {DType.F8_E4M3: 448.0, DType.F8_E5M2: 57344.0}
SCALES = [DType.F32, DType.BF16, DType.F16, DType.F64, DType.F8_E8M0, DType.U8]


def task_of(encoding: Encoding, numel: int, dtype: DType = DType.F8_E4M3) -> TensorTask:
    return TensorTask("x", (numel,), numel, dtype, Action.MERGE, (), 0, 0, 0, 0, encoding=encoding)


@pytest.mark.parametrize("dtype", CODES)
def test_every_value_gets_the_code_that_torch_gives_it(dtype: DType) -> None:
    """All codes, what lies half way between neighbours, and the floats next to those."""
    table = np.sort(code_table(dtype)[np.isfinite(code_table(dtype))].astype(np.float64))
    middles = np.array([(low + high) / 2 for low, high in pairwise(table)])
    points = np.concatenate([table, middles]).astype(np.float32)
    values = np.concatenate(
        [
            points,
            np.nextafter(points, np.float32(np.inf)),
            np.nextafter(points, np.float32(-np.inf)),
        ]
    )
    values = np.concatenate([values, np.float32([0.0, -0.0, 1e-45, -1e-45, 1e-38])])
    values = values[np.abs(values) <= LARGEST[dtype]]

    got = encode_values(values, dtype)

    expected = torch.from_numpy(values).to(CODES[dtype]).view(torch.uint8).numpy()
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("dtype", CODES)
def test_random_values_too_and_what_is_too_large_is_the_largest(dtype: DType) -> None:
    generator = np.random.default_rng(0)
    scale = 2.0 ** generator.integers(-20, 18, size=200_000)
    values = (generator.standard_normal(200_000) * scale).astype(np.float32)

    got = encode_values(values, dtype)

    limit = LARGEST[dtype]
    expected = torch.from_numpy(values).clamp(-limit, limit).to(CODES[dtype]).view(torch.uint8)
    np.testing.assert_array_equal(got, expected.numpy())


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("dtype", SCALES)
def test_scales_are_the_largest_magnitude_over_the_largest_code(dtype: DType, codes: DType) -> None:
    generator = np.random.default_rng(1)
    largest = (2.0 ** generator.uniform(-20, 12, size=5_000)).astype(np.float32)
    largest[:9] = [0, 448, 57344, 7, 14, 448 * 2.0**-20, 3.5, np.nextafter(np.float32(448), 449), 1]

    got = widen_scales(find_scales(largest, codes=codes, dtype=dtype), dtype)

    quotient = torch.from_numpy(largest) / LARGEST[codes]
    if dtype in (DType.F8_E8M0, DType.U8):
        wide = torch.from_numpy(largest).double() / LARGEST[codes]
        power = torch.exp2(torch.ceil(torch.log2(wide)))
        expected = torch.where(wide == 0, 2.0**-126, power).float().numpy()
    else:
        least = 2.0**-14 if dtype is DType.F16 else 2.0**-126
        stored = getattr(torch, dtype.torch_name)
        expected = quotient.clamp(min=least).to(stored).float().numpy()
    np.testing.assert_array_equal(got, expected)


def test_a_block_of_zeros_has_a_scale_that_divides() -> None:
    for dtype in SCALES:
        raw = find_scales(np.zeros(3, dtype=np.float32), codes=DType.F8_E4M3, dtype=dtype)
        wide = widen_scales(raw, dtype)
        assert (wide > 0).all()
        assert np.isfinite(1 / wide).all()


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("dtype", SCALES)
def test_what_a_code_stands_for_is_off_by_half_a_step_at_most(dtype: DType, codes: DType) -> None:
    generator = np.random.default_rng(2)
    shape = (70, 130)
    values = generator.standard_normal(shape) * 2.0 ** generator.integers(-9, 2, size=shape)
    encoding = Encoding("s", dtype, 3 * 5, 70, 130, (32, 32), 3 * 5)
    scales = TensorScales(task_of(encoding, values.size, codes))
    flat = values.astype(np.float32).reshape(-1)
    out = np.empty(flat.size, dtype=np.uint8)

    scales.look(0, flat)
    scales.conclude()
    scales.encode(0, flat, out)

    wide = widen_scales(scales.stored, dtype).astype(np.float64).reshape(3, 5)
    wide = wide.repeat(32, 0).repeat(32, 1)[:70, :130]
    decoded = code_table(codes)[out].astype(np.float64).reshape(shape) * wide
    bits, bias = (3, 7) if codes is DType.F8_E4M3 else (2, 15)
    exponent = np.floor(np.log2(np.maximum(np.abs(flat.reshape(shape)) / wide, 2.0 ** (1 - bias))))
    half = 2.0 ** (exponent - bits - 1) * wide
    # Beyond the bound only by the rounding of the quotient to float32.
    assert (np.abs(decoded - flat.reshape(shape)) <= half * (1 + 2.0**-20)).all()


ENCODINGS = {
    "blocks": Encoding("s", DType.F32, 2 * 3 * 4, 37, 61, (16, 16), 12),
    "rows": Encoding("s", DType.F32, 2 * 37, 37, 61, (1, 61), 37),
    "columns of blocks": Encoding("s", DType.F32, 2 * 37 * 2, 37, 61, (1, 32), 74),
    "matrices": Encoding("s", DType.F32, 2, 37, 61, (37, 61), 1),
    "one": Encoding("s", DType.F32, 1, 37, 61, (37, 61), 0),
    "elements": Encoding("s", DType.F32, 2 * 37 * 61, 37, 61, (1, 1), 37 * 61),
}


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(), kind=st.sampled_from(sorted(ENCODINGS)), step=st.sampled_from([1, 7, 64, 500])
)
def test_no_cut_changes_a_scale_or_a_code(data: Any, kind: str, step: int) -> None:
    encoding = ENCODINGS[kind]
    numel = 2 * encoding.rows * encoding.columns
    values = np.random.default_rng(3).standard_normal(numel).astype(np.float32)
    cuts = sorted({0, numel, *data.draw(st.lists(st.integers(0, numel), max_size=4))})
    ranges = list(pairwise(cuts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("streammerge.engine.encoding._STEP", step)
        scales = TensorScales(task_of(encoding, numel))
        for begin, end in data.draw(st.permutations(ranges)):
            scales.look(begin, values[begin:end])
        scales.conclude()
        out = np.empty(numel, dtype=np.uint8)
        for begin, end in ranges:
            # In place, as the engine does.
            memory = values[begin:end].copy().view(np.uint8)
            scales.encode(begin, memory.view(np.float32), memory[: end - begin])
            out[begin:end] = memory[: end - begin]

    height, width = encoding.block
    index = np.arange(numel).reshape(2, encoding.rows, encoding.columns)
    row, column = index // encoding.columns % encoding.rows, index % encoding.columns
    matrix = index // (encoding.rows * encoding.columns)
    place = matrix * encoding.matrix_scales + row // height * -(-encoding.columns // width)
    place = (place + column // width).reshape(-1)
    largest = np.zeros(encoding.scale_numel, dtype=np.float32)
    np.maximum.at(largest, place, np.abs(values))
    expected = torch.from_numpy(largest) / 448
    quotients = torch.from_numpy(values) / expected[torch.from_numpy(place)]
    np.testing.assert_array_equal(scales.stored.view("<f4"), expected.numpy())
    codes = quotients.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    np.testing.assert_array_equal(out, codes.numpy())


def test_a_magnitude_beyond_all_scales_is_refused_by_name() -> None:
    encoding = Encoding("s", DType.F16, 1, 1, 2, (1, 2), 1)
    scales = TensorScales(task_of(encoding, 2))
    scales.look(0, np.float32([1, 3e7]))

    with pytest.raises(NonFiniteError, match=r"x: the merged value 3e\+07 exceeds 2\.93458e\+07"):
        scales.conclude()
