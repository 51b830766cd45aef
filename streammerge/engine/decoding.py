"""Spans of files read into slots, where codes become the numbers that they stand for, in the same place.

A code is looked up, which is exact, and multiplied by its scale in float32, which rounds once. Values
depend on codes and scales alone, never on how a tensor is cut.

Memory: :data:`~streammerge.plan.chunking.DECODING_BYTES` per reading thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from streammerge.checkpoint.bytesource import ByteSource
from streammerge.checkpoint.types import Coding
from streammerge.dtypes import DType
from streammerge.engine.drawing import draw_rows
from streammerge.floats import widen
from streammerge.plan.chunking import DECODING_BYTES, ReadSpan

_STEP = 2**15
"""Values decoded at once: they stay in the cache while they are multiplied."""
_ROWS_BYTES = 2**19
"""Codes of whole rows that are read for a part of each."""
assert max(32 * _STEP, _ROWS_BYTES + 16 * _STEP) <= DECODING_BYTES  # noqa: S101 - codes, indices, scales and scales spread out

ReadScales = Callable[[int, int, memoryview], None]
"""Reads a range of a file: its index in the plan, first byte, and where to."""


def read_span(span: ReadSpan, sources: Sequence[ByteSource], memory: NDArray[np.uint8]) -> None:
    """Read a span to its place in a slot; of codes, the numbers that they stand for."""
    if span.rows is not None:
        draw_rows(span, span.rows, sources, memory)
        return
    source = sources[span.file]
    if span.coding is None:
        source.read_into(
            span.offset, memory.data[span.slot_offset : span.slot_offset + span.nbytes]
        )
        return

    def read(file: int, offset: int, out: memoryview) -> None:
        sources[file].read_into(offset, out)

    if span.coding.transposed_rows:
        _read_transposed(span, span.coding, memory, read)
        return
    view = memory.data[span.slot_offset : span.slot_offset + span.nbytes]
    source.read_into(span.offset, view)
    _decode(span, memory, read)


def _decode(span: ReadSpan, slot: NDArray[np.uint8], read: ReadScales) -> None:
    """Replace the codes of a span, at the end of the room of its values, by the values.

    Args:
        span: What was read; it is coded.
        slot: The slot, ``[bytes]``.
        read: Reads the scales.
    """
    coding = span.coding
    assert coding is not None  # noqa: S101 - the caller looked
    begin, nbytes = span.values_offset, 4 * span.numel
    room = slot[begin : begin + nbytes]
    codes = slot[span.slot_offset : span.slot_offset + span.nbytes]
    values = room.view("<f4")
    packed = coding.dtype.elements_per_item
    for first in range(0, span.numel, _STEP):
        count = min(_STEP, span.numel - first)
        # A copy: the last values of a step lie where its own codes were.
        some = codes[first // packed : (first + count) // packed].copy()
        out = values[first : first + count]
        _look_up(some, coding.dtype, out)
        _scale(out, coding, coding.first + first, read)


def _look_up(codes: NDArray[np.uint8], dtype: DType, out: NDArray[np.float32]) -> None:
    """Fill ``out``, ``[n]``, with what codes stand for, ``[n]`` or ``[n / 2]`` where a byte has two."""
    if dtype.elements_per_item == 1:
        np.take(code_table(dtype), codes, out=out, mode="clip")
    else:
        np.take(_pair_table(), codes, out=out.view(np.uint64), mode="clip")


@cache
def _pair_table() -> NDArray[np.uint64]:
    """Return what every byte of two codes stands for: two numbers, side by side in eight bytes."""
    codes = np.arange(256)
    table = code_table(DType.F4)
    pairs = np.stack((table[codes & 15], table[codes >> 4]), axis=1)
    found: NDArray[np.uint64] = pairs.reshape(-1).view(np.uint64)
    return found


def _read_transposed(
    span: ReadSpan, coding: Coding, slot: NDArray[np.uint8], read: ReadScales
) -> None:
    """Read a range of the transpose of a matrix of codes: some columns of all of its rows.

    Whole rows are read, since a request for every few bytes would take longer.
    """
    rows, packed, width = coding.transposed_rows, coding.dtype.elements_per_item, coding.block[1]
    values = slot[span.values_offset : span.values_offset + 4 * span.numel].view("<f4")
    # Columns of the matrix, which are rows of the range, out to whole scales.
    low = coding.first // rows // width * width
    high = min(-(-(coding.first + span.numel) // (rows * width)) * width, coding.columns)
    row_nbytes, scale_nbytes = coding.columns // packed, coding.scale_columns
    scale_nbytes *= coding.scale_dtype.itemsize
    # As many rows as there is room for, of all of a row and of the part that is wanted.
    count = max(1, min(_STEP // (high - low), _ROWS_BYTES // row_nbytes))
    for row in range(0, rows, count):
        some = min(count, rows - row)
        raw = np.empty((some, row_nbytes), dtype=np.uint8)
        read(span.file, span.offset + row * row_nbytes, raw.reshape(-1).data)
        strip = raw[:, low // packed : high // packed].reshape(-1)
        numbers = np.empty((some, high - low), dtype=np.float32)
        _look_up(strip, coding.dtype, numbers.reshape(-1))
        stored = np.empty(some * scale_nbytes, dtype=np.uint8)
        read(coding.scale_file, coding.scale_offset + row * scale_nbytes, stored.data)
        scales = widen_scales(stored, coding.scale_dtype).reshape(some, coding.scale_columns)
        scales = scales[:, low // width : -(-high // width)]
        numbers *= np.repeat(scales, width, axis=1)[:, : high - low]
        _place_columns(values, numbers, row, low, coding)


def _place_columns(
    values: NDArray[np.float32], numbers: NDArray[np.float32], row: int, low: int, coding: Coding
) -> None:
    """Put rows of the matrix into the columns of a range of its transpose.

    Args:
        values: The range, ``[n]``.
        numbers: ``[rows, columns]``, some rows and columns of the matrix.
        row: The first of these rows.
        low: The first of these columns.
        coding: Says where the range begins.
    """
    height, first, end = coding.transposed_rows, coding.first, coding.first + len(values)
    # Columns of the matrix that are whole in the range; at most one more at either end.
    begin_whole, end_whole = -(-first // height), end // height
    if begin_whole < end_whole:
        start = begin_whole * height - first
        whole = values[start : start + (end_whole - begin_whole) * height].reshape(-1, height)
        whole[:, row : row + len(numbers)] = numbers[:, begin_whole - low : end_whole - low].T
    for column in {first // height, end // height} - {*range(begin_whole, end_whole)}:
        begin = column * height + row
        skip, stop = max(0, first - begin), min(len(numbers), end - begin)
        if skip < stop:
            values[begin + skip - first : begin + stop - first] = numbers[skip:stop, column - low]


def _scale(values: NDArray[np.float32], coding: Coding, start: int, read: ReadScales) -> None:
    """Multiply values, the first of which has flat index ``start`` in the matrix, by their scales."""
    rows, columns = coding.block
    for begin, end, row, column in _pieces(start, len(values), coding):
        width = min(coding.columns, column + end - begin) - column
        first, last = column // columns, (column + width - 1) // columns
        scales = _read_scales(coding, row // rows, first, last + 1, read)
        spread = np.repeat(scales, columns)[column - first * columns :][:width]
        part = values[begin:end].reshape(-1, width)
        np.multiply(part, spread, out=part)


def _pieces(start: int, numel: int, coding: Coding) -> Iterator[tuple[int, int, int, int]]:
    """Cut a flat range into rows, whole ones together as long as they share their scales.

    Yields:
        Begin and end in the range, row and column of the first element.
    """
    done = 0
    while done < numel:
        row, column = divmod(start + done, coding.columns)
        left = numel - done
        count = min(left, coding.columns - column)
        if column == 0 and left >= coding.columns:
            shared = coding.block[0] - row % coding.block[0]
            count = min(left // coding.columns, shared) * coding.columns
        yield done, done + count, row, column
        done += count


def _read_scales(
    coding: Coding, row: int, begin: int, end: int, read: ReadScales
) -> NDArray[np.float32]:
    """Return some scales of one row of the matrix of scales, in float32."""
    size = coding.scale_dtype.itemsize
    raw = np.empty((end - begin) * size, dtype=np.uint8)
    place = coding.scale_offset + (row * coding.scale_columns + begin) * size
    read(coding.scale_file, place, raw.data)
    return widen_scales(raw, coding.scale_dtype)


def widen_scales(raw: NDArray[np.uint8], dtype: DType) -> NDArray[np.float32]:
    """Return stored scales in float32: exactly, but for float64, which is rounded."""
    if dtype in (DType.F8_E8M0, DType.U8):
        powers: NDArray[np.float32] = code_table(DType.F8_E8M0)[raw]
        return powers
    return widen(raw, dtype).astype(np.float32)


@cache
def code_table(dtype: DType) -> NDArray[np.float32]:
    """Return what every code of a type stands for.

    Source: the OCP specifications of 8-bit floating point (E4M3, E5M2) and of microscaling formats
    (E2M1, E8M0).
    """
    if dtype is DType.F8_E8M0:
        with np.errstate(over="ignore", under="ignore"):
            table = np.ldexp(np.float32(1), np.arange(256) - 127).astype(np.float32)
        table[255] = np.nan
        return table
    exponent_bits, mantissa_bits, bias = _FORMATS[dtype]
    codes = np.arange(2 ** (1 + exponent_bits + mantissa_bits))
    mantissa = codes % 2**mantissa_bits
    exponent = (codes >> mantissa_bits) % 2**exponent_bits
    sign = np.where(codes >> (exponent_bits + mantissa_bits), -1.0, 1.0)
    normal = np.ldexp(1 + mantissa / 2**mantissa_bits, exponent - bias)
    subnormal = np.ldexp(mantissa / 2**mantissa_bits, 1 - bias)
    values = sign * np.where(exponent > 0, normal, subnormal)
    top = exponent == 2**exponent_bits - 1
    if dtype is DType.F8_E4M3:
        values[top & (mantissa == 2**mantissa_bits - 1)] = np.nan
    elif dtype is DType.F8_E5M2:
        values[top] = np.where(mantissa[top] > 0, np.nan, sign[top] * np.inf)
    found: NDArray[np.float32] = values.astype(np.float32)
    return found


_FORMATS = {DType.F8_E4M3: (4, 3, 7), DType.F8_E5M2: (5, 2, 15), DType.F4: (2, 1, 1)}
"""Bits of the exponent and of the mantissa, and the exponent's bias."""
