"""Merged values become float8 codes with scales: the largest magnitude of each block, its scale, the codes.

    scale = largest magnitude / largest code, rounded to the type of the scales
    code  = value / scale, in float32, rounded to the nearest code (ties to even), at most the largest

So what a code stands for is off by at most half the distance of two codes, times the scale: of normal
codes at most ``2^-4`` of the value for F8_E4M3 and ``2^-3`` for F8_E5M2. Everything follows from the
values of a whole block, never from how a tensor is cut.

Source: the OCP specifications of 8-bit floating point and of microscaling formats; that a scale is the
largest magnitude over the largest code is what transformers, vLLM and llm-compressor do.

Memory: per tensor what :attr:`~streammerge.checkpoint.types.Encoding.nbytes` says, per thread
:data:`~streammerge.plan.demanding.ENCODING_BYTES`.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from streammerge.checkpoint.types import Encoding
from streammerge.dtypes import DType
from streammerge.engine.decoding import widen_scales
from streammerge.engine.finite import LARGEST
from streammerge.errors import NonFiniteError, printable
from streammerge.floats import narrow
from streammerge.plan.demanding import ENCODING_BYTES
from streammerge.plan.types import TensorTask

_STEP = 2**16
"""Values encoded at once: they and what is made of them stay in the cache."""
assert 48 * _STEP <= ENCODING_BYTES  # noqa: S101 - nine arrays of four bytes, masks and codes

_FORMATS = {DType.F8_E4M3: (3, 7), DType.F8_E5M2: (2, 15)}
"""Bits of the mantissa, and the exponent's bias."""
_LEAST = {DType.F16: 2.0**-14}
"""The smallest normal scale, of types that have not float32's."""
_LEAST_EXPONENT = -126
_POWERS = frozenset({DType.F8_E8M0, DType.U8})


class TensorScales:
    """The scales of one tensor: first the largest magnitudes, from any number of threads, then the scales."""

    def __init__(self, task: TensorTask) -> None:
        """Prepare for a task that has an encoding."""
        assert task.encoding is not None  # noqa: S101 - the caller looked
        self.encoding = task.encoding
        self.stored: NDArray[np.uint8] = np.empty(0, dtype=np.uint8)
        """``[scale_numel * itemsize]``, as they are stored, once :meth:`conclude` was called."""
        self._task = task
        self._lock = threading.Lock()
        columns = self.encoding.scale_columns
        # Largest magnitudes, then scales.
        self._values = np.zeros((self.encoding.scale_numel // columns, columns), dtype=np.float32)

    def look(self, start: int, values: NDArray[np.float32]) -> None:
        """Take values into account; thread-safe.

        Args:
            start: Flat index in the tensor of the first one.
            values: ``[numel]``, finite.
        """
        for strip in _iter_strips(self.encoding, start, values.size):
            found = _largest(self.encoding, strip, values[strip.begin : strip.end])
            with self._lock:
                known = strip.scales_of(self.encoding, self._values)
                np.maximum(known, found, out=known)

    def conclude(self) -> None:
        """Find the scales; all values have been looked at.

        Raises:
            NonFiniteError: One is larger than the type of the scales allows.
        """
        encoding, itemsize = self.encoding, self.encoding.scale_dtype.itemsize
        limit = LARGEST.get(encoding.scale_dtype, math.inf) * LARGEST[self._task.dtype]
        largest = float(self._values.max(initial=0))
        if largest > limit:
            raise NonFiniteError(
                f"{printable(self._task.name)}: the merged value {largest:g} exceeds {limit:g}, the "
                f"largest that {self._task.dtype} codes with {encoding.scale_dtype} scales hold; leave "
                "output.quantization out, or choose smaller weights"
            )
        self.stored = np.empty(encoding.scale_numel * itemsize, dtype=np.uint8)
        flat = self._values.reshape(-1)
        for begin in range(0, flat.size, _STEP):
            some = flat[begin : begin + _STEP]
            raw = find_scales(some, codes=self._task.dtype, dtype=encoding.scale_dtype)
            self.stored[begin * itemsize : begin * itemsize + raw.size] = raw
            some[:] = widen_scales(raw, encoding.scale_dtype)

    def encode(self, start: int, values: NDArray[np.float32], out: NDArray[np.uint8]) -> None:
        """Fill ``out`` with the codes of values, once the scales are known.

        Args:
            start: Flat index in the tensor of the first value.
            values: ``[numel]``, finite.
            out: ``[numel]``; may be the beginning of the memory of the values.
        """
        for strip in _iter_strips(self.encoding, start, values.size):
            rows = values[strip.begin : strip.end].reshape(strip.rows, strip.columns)
            quotients = rows / strip.spread(self.encoding, self._values)
            out[strip.begin : strip.end] = encode_values(quotients.reshape(-1), self._task.dtype)


def find_scales(largest: NDArray[np.float32], *, codes: DType, dtype: DType) -> NDArray[np.uint8]:
    """Return the scales of blocks, as they are stored.

    Args:
        largest: ``[blocks]`` the largest magnitude of each, finite.
        codes: The type of the codes.
        dtype: The type of the scales. Powers of two are rounded up, so that nothing is cut off; others
            to the nearest. None is below the smallest normal number of its type, or of float32.
    """
    if dtype in _POWERS:
        mantissa, exponent = np.frexp(largest)
        top, place = math.frexp(LARGEST[codes])
        exponent += (mantissa > top) - place
        exponent[largest == 0] = _LEAST_EXPONENT
        powers: NDArray[np.uint8] = (np.clip(exponent, _LEAST_EXPONENT, 127) + 127).astype(np.uint8)
        return powers
    least = np.float32(_LEAST.get(dtype, 2.0**_LEAST_EXPONENT))
    scales = np.maximum(largest / np.float32(LARGEST[codes]), least)
    return narrow(scales.astype(np.float64), dtype)


def encode_values(values: NDArray[np.float32], dtype: DType) -> NDArray[np.uint8]:
    """Return the nearest codes of finite values, ties to even; beyond the largest, the largest.

    Args:
        values: ``[numel]``.
        dtype: F8_E4M3 or F8_E5M2.
    """
    mantissa, bias = _FORMATS[dtype]
    signs = (values.view("<u4") >> 24).astype(np.uint8) & 0x80
    magnitudes = np.minimum(np.abs(values), np.float32(LARGEST[dtype]))
    bits = magnitudes.view("<u4")
    shift = 23 - mantissa
    # Half of what is cut off, less one where the last bit that stays is even.
    normal = (bits + (2 ** (shift - 1) - 1) + (bits >> shift & 1)) >> shift
    normal -= (127 - bias) << mantissa
    # Below the normal codes they are evenly spaced, as floats are from this number on.
    spaced = np.float32(2.0 ** (24 - bias - mantissa))
    subnormal = (magnitudes + spaced).view("<u4") - spaced.view("<u4")
    small = magnitudes < np.float32(2.0 ** (1 - bias))
    codes: NDArray[np.uint8] = np.where(small, subnormal, normal).astype(np.uint8)
    codes |= signs
    return codes


@dataclass(frozen=True, slots=True)
class _Strip:
    """Whole rows of a matrix, or a part of one."""

    begin: int
    """First element in the range."""
    end: int
    """End in the range."""
    row: int
    """First row, in its matrix."""
    first_column: int
    """First column."""
    rows: int
    """Rows."""
    columns: int
    """Columns; all of them where there are several rows."""
    first_scale: int
    """Row of the scales at which those of its matrix begin."""

    def scales_of(self, encoding: Encoding, scales: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the view of the scales of its blocks: ``[rows of blocks, columns of blocks]``."""
        height, width = encoding.block
        last = self.first_scale + (self.row + self.rows - 1) // height
        return scales[
            self.first_scale + self.row // height : last + 1,
            self.first_column // width : (self.first_column + self.columns - 1) // width + 1,
        ]

    def spread(self, encoding: Encoding, scales: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the scale of every element, or something that broadcasts to that."""
        height, width = encoding.block
        own = self.scales_of(encoding, scales)
        if height > 1:
            rows = np.arange(self.row, self.row + self.rows) // height - self.row // height
            own = own[rows]
        if own.shape[1] == 1:
            return own
        return np.repeat(own, width, axis=1)[:, self.first_column % width :][:, : self.columns]


def _iter_strips(encoding: Encoding, start: int, numel: int) -> Iterator[_Strip]:
    """Cut a flat range of a tensor into strips of at most :data:`_STEP` elements."""
    columns = encoding.columns
    done = 0
    while done < numel:
        place, column = divmod(start + done, columns)
        matrix, row = divmod(place, encoding.rows)
        first_scale = matrix * encoding.matrix_scales // encoding.scale_columns
        rows = min((numel - done) // columns, _STEP // columns, encoding.rows - row)
        if column or rows < 1:
            rows, width = 1, min(columns - column, numel - done, _STEP)
        else:
            width = columns
        end = done + rows * width
        yield _Strip(done, end, row, column, rows, width, first_scale)
        done = end


def _largest(encoding: Encoding, strip: _Strip, values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the largest magnitude of each block, as far as a strip has it."""
    height, width = encoding.block
    rows = np.abs(values).reshape(strip.rows, strip.columns)
    # Along rows first, where neighbours lie side by side; what is left is small.
    if strip.first_column % width or strip.columns % width:
        found = np.maximum.reduceat(rows, _starts(strip.first_column, strip.columns, width), axis=1)
    else:
        found = rows.reshape(strip.rows, -1, width).max(axis=2)
    if height > 1 and strip.rows > 1:
        found = np.maximum.reduceat(found, _starts(strip.row, strip.rows, height), axis=0)
    largest: NDArray[np.float32] = found
    return largest


def _starts(first: int, count: int, block: int) -> list[int]:
    """Return where blocks begin among ``count`` places from ``first`` on, the first place among them."""
    return [0, *range(block - first % block, count, block)]
