"""Stored floats to float64 and back, in numpy, which has no bfloat16."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from streammerge.dtypes import DType

KINDS = {DType.F64: "<f8", DType.F32: "<f4", DType.F16: "<f2"}
"""The float types that numpy has."""


def widen(raw: NDArray[np.uint8], dtype: DType) -> NDArray[np.float64]:
    """Return stored floats as float64, which is exact.

    Args:
        raw: ``[numel * itemsize]``.
        dtype: One of :data:`KINDS`, or bfloat16.
    """
    with np.errstate(all="ignore"):
        if dtype is DType.BF16:
            # The upper half of a float32.
            return (raw.view("<u2").astype("<u4") << 16).view("<f4").astype(np.float64)
        return raw.view(KINDS[dtype]).astype(np.float64)


def narrow(values: NDArray[np.float64], dtype: DType) -> NDArray[np.uint8]:
    """Return float64 as it is stored, each rounded once, to the nearest, ties to even.

    Args:
        values: ``[numel]``.
        dtype: As for :func:`widen`.
    """
    with np.errstate(over="ignore"):
        if dtype is not DType.BF16:
            stored: NDArray[np.float64] = values.astype(KINDS[dtype])
            return stored.view(np.uint8)
        single = values.astype(np.float32)
    bits = single.view(np.uint32)
    # To float32 rounded to odd: whatever is not exact there stays off the ties of bfloat16.
    inexact = (single.astype(np.float64) != values) & np.isfinite(values) & np.isfinite(single)
    away = np.abs(single.astype(np.float64)) > np.abs(values)
    truncated = np.where(inexact & away, bits - np.uint32(1), bits)
    odd = np.where(inexact, truncated | np.uint32(1), truncated)
    rounded = odd + np.uint32(0x7FFF) + ((odd >> np.uint32(16)) & np.uint32(1))
    # NaN must not become infinity.
    kept = np.where(np.isnan(single), odd | np.uint32(0x400000), rounded)
    upper: NDArray[np.uint16] = (kept >> np.uint32(16)).astype("<u2")
    return upper.view(np.uint8)
